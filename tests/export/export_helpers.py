"""What the export tests share: a bundle run stage by stage, and the decoder in Hugging Face modules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import DynamicCache

from ep_export.bundle import Bundle, Component
from ep_export.families import family_named
from ep_export.families.base import DecoderModules
from ep_export.runtime.components import length_feeds

Arrays = dict[str, NDArray[Any]]
VISUAL = np.arange(4, 24, dtype=np.int64)
LENGTH = 30


def session(bundle: Bundle, component: str) -> onnxruntime.InferenceSession:
    """A component in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(bundle.file(bundle.manifest.component(component).file)), options)


def hugging_face(path: Path) -> Any:
    """The checkpoint in float32."""
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def random_prompt(width: int, axes: int = 3) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Random embeddings [1, LENGTH, d] and positions, mRoPE-like where there are three axes."""
    rng = np.random.default_rng(0)
    positions = np.tile(np.arange(LENGTH, dtype=np.int64), (axes, 1))
    if axes == 3:
        square = np.arange(len(VISUAL))
        positions[0, VISUAL], positions[1, VISUAL], positions[2, VISUAL] = 4, 4 + square // 5, 4 + square % 5
    return rng.standard_normal((1, LENGTH, width)).astype(np.float32), positions[:, None]


@dataclass(frozen=True)
class Prefill:
    """What came out of a prompt.

    Attributes:
        logits: [1, 1, V].
        spans: Outputs of every span.
        prunes: Outputs of every prune component.
    """

    logits: NDArray[np.float32]
    spans: tuple[Arrays, ...]
    prunes: tuple[Arrays, ...]


class BundleRun:
    """A bundle's decoder, run as its manifest says."""

    def __init__(self, bundle: Bundle, *policies: str) -> None:
        self.manifest = bundle.manifest
        self.stages = self.manifest.stages(self.manifest.scheduled(policies))
        self._sessions = {stage.name: session(bundle, stage.name) for stage in self.stages}
        self.reset()

    def reset(self) -> None:
        """Forget the caches."""
        dims, dtype = self.manifest.dims, self._dtype
        empty = np.zeros((1, dims.kv_heads, 0, dims.head_dim), dtype=dtype)
        self.caches = {f"{i}.{part}": empty for i in range(dims.layers) for part in ("key", "value")}

    def prefill(self, embeds: NDArray[Any], positions: NDArray[np.int64], keep: Sequence[int]) -> Prefill:
        """A prompt of which `keep` visual tokens remain after every cut."""
        hidden, visual, spans, prunes = embeds.astype(self._dtype), VISUAL, [], []
        states: Arrays = {}
        for stage in self.stages:
            if stage.cut is None:
                states = self._span(stage, hidden, positions)
                hidden = states.get("hidden_states", hidden)
                spans.append(states)
                continue
            source = getattr(getattr(stage.chooser, "source", None), "value", "")
            feeds = {
                "states": states.get(f"{source}_states"),
                "hidden": hidden,
                "position_ids": positions,
                "visual_index": visual,
                "keep_slots": np.zeros(keep[stage.cut], dtype=np.int64),
            }
            kept = self._run(stage, feeds)
            hidden, positions = kept["kept_hidden"], kept["kept_position_ids"]
            visual = kept["kept_visual_index"]
            prunes.append(kept)
        return Prefill(spans[-1]["logits"], tuple(spans), tuple(prunes))

    def step(self, embeds: NDArray[Any], position: int) -> NDArray[np.float32]:
        """A decode step: spans alone."""
        positions = np.full((self.manifest.dims.position_axes, 1, 1), position, dtype=np.int64)
        hidden = embeds.astype(self._dtype)
        for span in self.manifest.spans:
            got = self._span(span, hidden, positions)
            hidden = got.get("hidden_states", hidden)
        return got["logits"]

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype({"fp32": "float32", "fp16": "float16"}[self.manifest.precision.value])

    def _span(self, span: Component, hidden: NDArray[Any], positions: NDArray[np.int64]) -> Arrays:
        caches = {f"past_key_values.{name}": value for name, value in self.caches.items()}
        past = self.caches[f"{span.layer_range.start}.key"].shape[2]
        lengths = length_feeds([past], hidden.shape[1])
        if "write_index" in {spec.name for spec in span.inputs}:  # new rows need room
            room = ((0, 0), (0, 0), (0, hidden.shape[1]), (0, 0))
            caches = {name: np.pad(value, room) for name, value in caches.items()}
        got = self._run(span, {"inputs_embeds": hidden, "position_ids": positions, **caches, **lengths})
        self.caches |= {
            name.removeprefix("present."): got[name] for name in got if name.startswith("present.")
        }
        return got

    def _run(self, component: Component, feeds: Mapping[str, Any]) -> Arrays:
        names = [spec.name for spec in component.outputs]
        wanted = {spec.name: feeds[spec.name] for spec in component.inputs}
        return dict(zip(names, self._sessions[component.name].run(names, wanted), strict=True))


@dataclass(frozen=True)
class TorchRun:
    """What the pruned Hugging Face layers computed: [..] as `Prefill`, hidden states by layer."""

    logits: torch.Tensor
    entering: Mapping[int, torch.Tensor]
    projections: Mapping[int, tuple[torch.Tensor, ...]]
    cache: DynamicCache


@dataclass(frozen=True)
class TorchDecoder:
    """The pruned decoder from Hugging Face's own layers, pruned where it is told."""

    model: Any
    family: str

    @cached_property
    def modules(self) -> DecoderModules:
        return family_named(self.family).decoder(self.model)

    def __call__(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        rows: Mapping[int, NDArray[np.int64]],
        cache: DynamicCache | None = None,
    ) -> TorchRun:
        """Run all layers; before layer K only `rows[K]` of the sequence that arrives go on."""
        hidden, cache = embeds, cache or DynamicCache()
        entering, projections = {}, {}
        for i, layer in enumerate(self.modules.layers):
            entering[i] = hidden
            if i in rows:
                hidden, positions = hidden[:, rows[i]], positions[:, :, rows[i]]
            with self._captured(layer) as projections[i]:
                hidden = self._layer(layer, i, hidden, positions, cache)
        logits = self.modules.lm_head(self.modules.norm(hidden[:, -1:]))
        return TorchRun(logits, entering, projections, cache)

    def _layer(
        self, layer: Any, number: int, hidden: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        past, length = cache.get_seq_length(number), hidden.shape[1]
        rope = self.modules.rotary(hidden, positions if positions.shape[0] > 1 else positions[0])
        seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        output = layer(
            hidden, attention_mask=mask, position_embeddings=rope, past_key_values=cache, use_cache=True
        )
        return output[0] if isinstance(output, tuple) else output

    @contextlib.contextmanager
    def _captured(self, layer: Any) -> Any:
        """Outputs of the projections, in the order query, key, value."""
        own = layer.self_attn
        seen: list[torch.Tensor] = []
        hooks = [
            p.register_forward_hook(lambda _m, _i, out: seen.append(out))
            for p in (own.q_proj, own.k_proj, own.v_proj)
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

"""What the export tests share: a bundle's sessions, and the decoder in Hugging Face modules."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import DynamicCache

from ep_export.bundle import Bundle, Dialect, Precision, WeightsMode
from ep_export.checkpoint import open_checkpoint
from ep_export.export import export_bundle
from ep_export.policy import Evidence, EvidenceKind, Keep, Policy

EVIDENCE = Evidence(EvidenceKind.TOLD, "a test")


def build(
    path: Path,
    out: Path,
    policy: Policy,
    *,
    dialect: Dialect = Dialect.PORTABLE,
    precision: Precision = Precision.FP32,
    weights: WeightsMode = WeightsMode.LINK,
) -> Bundle:
    """Export a checkpoint directory."""
    out.mkdir(parents=True)
    return export_bundle(
        open_checkpoint(str(path)),
        out,
        policy=policy,
        evidence=EVIDENCE,
        keep=Keep(ratio=0.5),
        dialect=dialect,
        precision=precision,
        weights=weights,
    )


def session(bundle: Bundle, component: str) -> onnxruntime.InferenceSession:
    """A component in ONNX Runtime on the CPU, warnings about the graph shown by failing tests only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(str(bundle.file(bundle.manifest.component(component).file)), options)


def hugging_face(path: Path) -> Any:
    """The checkpoint in float32."""
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def random_prompt(width: int, length: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random embeddings, mRoPE-like positions and the places of visual tokens."""
    rng = np.random.default_rng(0)
    visual = np.arange(4, 24, dtype=np.int64)
    positions = np.tile(np.arange(length, dtype=np.int64), (3, 1))
    positions[1, visual], positions[2, visual] = 4 + np.arange(20) // 5, 4 + np.arange(20) % 5
    positions[0, visual] = 4
    embeds = rng.standard_normal((1, length, width)).astype(np.float32)
    return embeds, positions[:, None], visual


@dataclass
class Decoder:
    """Head and tail of a bundle, run with two caches as a runtime would."""

    bundle: Bundle

    def __post_init__(self) -> None:
        self.head, self.tail = session(self.bundle, "decoder_head"), session(self.bundle, "decoder_tail")
        dims, layer = self.bundle.manifest.dims, self.bundle.manifest.policy.layer
        self.parts = {self.head: range(layer), self.tail: range(layer, dims.layers)}
        self.reset()

    def reset(self) -> None:
        """Forget the caches."""
        dims = self.bundle.manifest.dims
        empty = np.zeros((1, dims.kv_heads, 0, dims.head_dim), dtype=np.float32)
        self.caches = {f"{i}.{part}": empty for i in range(dims.layers) for part in ("key", "value")}

    def __call__(
        self, embeds: np.ndarray, positions: np.ndarray, visual: np.ndarray, keep: int
    ) -> dict[str, Any]:
        """One pass; returns logits, kept_index and hidden_states."""
        feeds = {
            "inputs_embeds": embeds,
            "position_ids": positions,
            "visual_index": visual,
            "keep_slots": np.zeros(keep, dtype=np.int64),
        }
        head = self._run(self.head, feeds)
        feeds = {"hidden_states": head["hidden_states"], "position_ids": head["kept_position_ids"]}
        return {**head, **self._run(self.tail, feeds)}

    def step(self, embeds: np.ndarray, position: int) -> dict[str, Any]:
        """A decode step: one position passed as visual_index, so that M = S."""
        axes = self.bundle.manifest.dims.position_axes
        positions = np.full((axes, 1, 1), position, dtype=np.int64)
        return self(embeds, positions, np.zeros(1, dtype=np.int64), 1)

    def _run(self, part: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for i in self.parts[part]:
            for kind in ("key", "value"):
                feeds[f"past_key_values.{i}.{kind}"] = self.caches[f"{i}.{kind}"]
        names = [output.name for output in part.get_outputs()]
        got = dict(zip(names, part.run(None, feeds), strict=True))
        for name, value in got.items():
            if name.startswith("present."):
                self.caches[name.removeprefix("present.")] = value
        return got


@dataclass
class TorchDecoder:
    """The pruned decoder from Hugging Face's own layers, pruned where it is told."""

    model: Any

    def __call__(
        self, embeds: torch.Tensor, positions: torch.Tensor, layer: int, kept: Any
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """(logits of the last position, hidden states entering layer K, caches)."""
        language = self.model.model.language_model
        hidden, cache = embeds, DynamicCache()
        states: list[torch.Tensor] = []
        with contextlib.ExitStack() as stack:
            for i, block in enumerate(language.layers):
                if i == layer - 1:
                    handle = block.self_attn.q_proj.register_forward_hook(
                        lambda _m, _i, out: states.append(out)
                    )
                    stack.callback(handle.remove)
                if i == layer:
                    index = kept(states[0][0].unflatten(-1, (-1, block.self_attn.head_dim)), hidden)
                    hidden, positions = hidden[:, index], positions[:, :, index]
                    entering = hidden
                past = cache.get_seq_length(i)
                rope = language.rotary_emb(hidden, positions)
                length = hidden.shape[1]
                seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)
                mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
                hidden = block(
                    hidden,
                    attention_mask=mask,
                    position_embeddings=rope,
                    past_key_values=cache,
                    use_cache=True,
                )
        logits = self.model.lm_head(language.norm(hidden[:, -1:]))
        return logits, entering, cache

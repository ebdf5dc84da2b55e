"""One component at a time in PyTorch: what Polygraphy compares the graphs with.

Every component is run on given inputs by Hugging Face's own modules and caches, so that a difference belongs
to the component it shows in. The vision encoder runs as the family cuts it for tracing, on the model's own
parameters (`validate` without Polygraphy compares it with Hugging Face's own forward).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.entropy import select_tokens, token_scores
from ep_export.families import family_of
from ep_export.policy import Policy, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["STEM", "Arrays", "Choice", "Components", "Watch"]

STEM = "stem"
"""Prefix of a vision encoder's nodes before its blocks."""

Arrays = Mapping[str, NDArray[Any]]
"""Inputs or outputs of a component by name."""

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """What the head scored and kept in one run.

    Attributes:
        states: [N, heads, head_dim] float32, what was scored.
        kept: [k] prompt positions of visual tokens, by exact scores.
    """

    states: torch.Tensor
    kept: NDArray[np.int64]


@dataclass
class Watch:
    """Which modules to watch, and what they saw.

    Attributes:
        modules: Label -> module.
        inputs: Label -> the first tensor that entered it.
        outputs: Label -> the first tensor that left it.
    """

    modules: Mapping[str, torch.nn.Module]
    inputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    outputs: dict[str, NDArray[Any]] = field(default_factory=dict)


class Components:
    """The components of a bundle in PyTorch.

    Args:
        model: From `ep_export.reference.load_model`.
        policy: The bundle's.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        family = family_of(model.config.model_type)
        self.model = model
        self._policy = policy
        self._decoder = family.decoder(model)
        self._dims = family.dims(model.config)
        self._encoders = {"vision_encoder": family.vision(model), "video_encoder": family.video(model)}
        self._dtype = next(model.parameters()).dtype

    def run(
        self,
        component: str,
        feeds: Arrays,
        *,
        kept: NDArray[np.int64] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run one component.

        Args:
            component: Name in the manifest.
            feeds: Its inputs by name. Caches are empty, or one position follows them.
            kept: Prompt positions that leave the head; its own choice by exact float64 scores when None.
            watch: Filled with what the modules it names saw.

        Returns:
            Its outputs by name; floats as float32.
        """
        with ExitStack() as undo, torch.inference_mode():
            if watch is not None:
                _install(watch, undo)
            tensors = {name: self._tensor(feed) for name, feed in feeds.items()}
            if component == "embed_tokens":
                made = {"inputs_embeds": self._decoder.embed_tokens(tensors["input_ids"])}
            elif component == "decoder_head":
                made = self._head(tensors, kept)
            elif component == "decoder_tail":
                made = self._tail(tensors)
            else:
                made = {"visual_embeds": self._vision(component, list(tensors.values()))}
            return {name: _array(tensor) for name, tensor in made.items()}

    def choice(self, feeds: Arrays) -> Choice:
        """What the head scores on these inputs, and what it keeps by exact scores."""
        with torch.inference_mode():
            tensors = {name: self._tensor(feed) for name, feed in feeds.items()}
            _, _, states = self._below(tensors)
            kept = self._choose(states, tensors)
        return Choice(states.float(), kept.numpy())

    def sections(self, component: str) -> dict[str, torch.nn.Module]:
        """The repeated parts of a component under the prefix that their nodes have in the graph."""
        if component == "decoder_head":
            return {f"layers.{i}": self._decoder.layers[i] for i in range(self._policy.layer)}
        if component == "decoder_tail":
            layers = range(self._policy.layer, self._dims.layers)
            return {f"layers.{i}": self._decoder.layers[i] for i in layers}
        encoder = self._encoders.get(component)
        if encoder is None:
            return {}
        return {STEM: encoder.stem, **{f"blocks.{i}": block for i, block in enumerate(encoder.blocks)}}

    def _vision(self, component: str, feeds: list[torch.Tensor]) -> torch.Tensor:
        encoder = self._encoders[component]
        if encoder is None:
            raise KeyError(component)
        made = encoder.stem(*feeds)
        hidden, *carry = made if isinstance(made, tuple) else (made,)
        for block in encoder.blocks:
            hidden = block(hidden, *carry)
        merged: torch.Tensor = encoder.merger(hidden, *carry)
        return merged

    def _head(
        self, feeds: dict[str, torch.Tensor], kept: NDArray[np.int64] | None
    ) -> dict[str, torch.Tensor]:
        hidden, caches, states = self._below(feeds)
        if kept is None:
            index = feeds["visual_index"]
            stays = torch.ones(hidden.shape[1], dtype=torch.bool)
            stays[index] = False
            stays[self._choose(states, feeds)] = True
            rows = stays.nonzero()[:, 0]
        else:
            rows = torch.from_numpy(np.array(kept))
        return {
            "hidden_states": hidden[:, rows],
            "kept_position_ids": feeds["position_ids"][..., rows],
            "kept_index": rows,
            **caches,
        }

    def _below(
        self, feeds: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Layers 0..K-1: hidden states, caches, and the visual tokens' states that are scored."""
        seen: list[torch.Tensor] = []
        source = self._policy.source
        with ExitStack() as undo:
            if source is not Source.HIDDEN:
                attention: Any = self._decoder.layers[self._policy.layer - 1].self_attn
                names = {Source.QUERY: "q_proj", Source.KEY: "k_proj", Source.VALUE: "v_proj"}
                projection = getattr(attention, names[source])
                hook = projection.register_forward_hook(lambda _m, _i, output: seen.append(output))
                undo.callback(hook.remove)
            layers = range(self._policy.layer)
            hidden, caches = self._layers(layers, feeds["inputs_embeds"], feeds["position_ids"], feeds)
        grouped = source in {Source.KEY, Source.VALUE}
        heads = self._dims.kv_heads if grouped else self._dims.heads
        states = (seen[0] if seen else hidden)[0, feeds["visual_index"]]
        return hidden, caches, states.reshape(len(states), heads, -1)

    def _choose(self, states: torch.Tensor, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        policy = self._policy
        chosen: torch.Tensor = select_tokens(
            token_scores(states, policy.scorer),
            len(feeds["keep_slots"]),
            select=policy.select,
            visual_index=feeds["visual_index"],
            budget=policy.budget,
        )
        return chosen

    def _tail(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        layers = range(self._policy.layer, self._dims.layers)
        hidden, caches = self._layers(layers, feeds["hidden_states"], feeds["position_ids"], feeds)
        logits = self._decoder.lm_head(self._decoder.norm(hidden[:, -1:]))
        return {"logits": logits, **caches}

    def _layers(
        self, layers: range, hidden: torch.Tensor, positions: torch.Tensor, feeds: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Hugging Face's layers with its own cache; no mask, so causality is what `sdpa` makes of None."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for i in layers:
            key, value = (feeds[f"past_key_values.{i}.{part}"] for part in ("key", "value"))
            if key.shape[2]:
                if hidden.shape[1] != 1:
                    raise ValueError("after a cache one position follows")  # else a mask would be needed
                cache.update(key, value, i)
        # one axis is [S] to Hugging Face, several are [A, 1, S]
        embeddings = self._decoder.rotary(hidden, positions if len(positions) > 1 else positions[0])
        for i in layers:
            output = self._decoder.layers[i](
                hidden,
                attention_mask=None,
                position_embeddings=embeddings,
                past_key_values=cache,
                use_cache=True,
            )
            hidden = output[0] if isinstance(output, tuple) else output
        made = {}
        for i in layers:
            made[f"present.{i}.key"], made[f"present.{i}.value"] = (
                cache.layers[i].keys,
                cache.layers[i].values,
            )
        return hidden, made

    def _tensor(self, feed: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(feed))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _install(watch: Watch, undo: ExitStack) -> None:
    for label, module in watch.modules.items():
        # `setdefault`: a module that runs twice is compared where it runs first
        def before(_module: Any, args: tuple[Any, ...], label: str = label) -> None:
            if args and isinstance(args[0], torch.Tensor):
                watch.inputs.setdefault(label, _array(args[0]))

        def after(_module: Any, _args: Any, output: Any, label: str = label) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor):
                watch.outputs.setdefault(label, _array(value))

        undo.callback(module.register_forward_pre_hook(before).remove)
        undo.callback(module.register_forward_hook(after).remove)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """On the host; half types widened exactly."""
    made: NDArray[Any] = (tensor.float() if tensor.dtype in _HALF else tensor).detach().cpu().numpy().copy()
    return made

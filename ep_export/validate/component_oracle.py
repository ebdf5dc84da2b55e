"""One component at a time in PyTorch: what `validate --polygraphy` and a kit's golden files compare with.

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

from ep_export.bundle import Component, Role
from ep_export.choosers import CutTokens, choose, state_heads
from ep_export.families import family_of
from ep_export.policy import Cut, Source, scored_source
from ep_export.reference import SpanRecorder, cut_tokens, run_layers, staying

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ep_export.dims import DecoderDims

__all__ = ["STEM", "Arrays", "ComponentOracle", "Watch", "prune_tokens"]

STEM = "stem"
"""Prefix of a vision encoder's nodes before its blocks."""

Arrays = Mapping[str, NDArray[Any]]
"""Inputs or outputs of a component by name."""

_Tensors = dict[str, torch.Tensor]


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


class ComponentOracle:
    """The components of a bundle in PyTorch.

    Args:
        model: From `ep_export.reference.load_model`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        family = family_of(model.config.model_type)
        self.model = model
        self._decoder = family.decoder(model)
        self._dims = family.dims(model.config)
        self._encoders = family.encoders(model)
        self._dtype = next(model.parameters()).dtype

    def run(
        self,
        component: Component,
        feeds: Arrays,
        *,
        kept: NDArray[np.int64] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run one component.

        Args:
            component: From the manifest.
            feeds: Its inputs by name. Caches are empty, or one position follows them.
            kept: Of a prune component, the positions [M] that go on; its own exact choice when None.
            watch: Filled with what the modules it names saw.

        Returns:
            Its outputs by name; floats as float32.
        """
        with ExitStack() as undo, torch.inference_mode():
            if watch is not None:
                _install(watch, undo)
            tensors = {name: self._tensor(feed) for name, feed in feeds.items()}
            if component.role is Role.EMBED:
                outputs = {"inputs_embeds": self._decoder.embed_tokens(tensors["input_ids"])}
            elif component.role is Role.VISION:
                outputs = {"visual_embeds": self._vision(component.name, list(tensors.values()))}
            elif component.role is Role.DECODER:
                outputs = self._span(component, tensors)
            else:
                outputs = self._prune(component, tensors, kept)
            return {name: _array(tensor) for name, tensor in outputs.items()}

    def sections(self, component: Component) -> dict[str, torch.nn.Module]:
        """The repeated parts of a component under the prefix that their nodes have in the graph."""
        if component.role is Role.DECODER:
            return {f"layers.{i}": self._decoder.layers[i] for i in component.layer_range}
        encoder = self._encoders.get(component.name)
        if encoder is None:
            return {}
        return {STEM: encoder.stem, **{f"blocks.{i}": block for i, block in enumerate(encoder.blocks)}}

    def _vision(self, name: str, feeds: list[torch.Tensor]) -> torch.Tensor:
        encoder = self._encoders[name]
        outputs = encoder.stem(*feeds)
        hidden, *carry = outputs if isinstance(outputs, tuple) else (outputs,)
        for block in encoder.blocks:
            hidden = block(hidden, *carry)
        merged: torch.Tensor = encoder.merger(hidden, *carry)
        return merged

    def _span(self, span: Component, feeds: _Tensors) -> _Tensors:
        """Hugging Face's layers with its own cache; no mask, so causality is what `sdpa` makes of None."""
        from transformers import DynamicCache

        layers, cache = span.layer_range, DynamicCache()
        hidden, positions = feeds["inputs_embeds"], feeds["position_ids"]
        given = feeds[f"past_key_values.{layers.start}.key"].shape[2]
        filled = int(feeds["write_index"][0]) if "write_index" in feeds else given
        for i in layers:
            key, value = (feeds[f"past_key_values.{i}.{part}"][:, :, :filled] for part in ("key", "value"))
            if filled:
                if hidden.shape[1] != 1:
                    raise ValueError("after a cache one position follows")  # else a mask would be needed
                cache.update(key, value, i)
        arguments = {
            "attention_mask": None,
            # one axis is [S] to Hugging Face, several are [A, 1, S]
            "position_embeddings": self._decoder.rotary(
                hidden, positions if len(positions) > 1 else positions[0]
            ),
            "past_key_values": cache,
            "use_cache": True,
        }
        recorder = SpanRecorder(self._decoder, [layers.stop])
        with ExitStack() as undo:
            recorder.install(undo)
            hidden = run_layers(self._decoder, hidden, layers, dict.fromkeys(layers, arguments))
        last = layers.stop == self._dims.layers
        outputs = self._last(hidden) if last else self._onward(span, hidden, recorder)
        # of caches that new rows are written into, what lies behind them stays as it came
        written = filled + hidden.shape[1]
        for i in layers:
            for part, present in (("key", cache.layers[i].keys), ("value", cache.layers[i].values)):
                rest = feeds[f"past_key_values.{i}.{part}"][:, :, written:]
                outputs[f"present.{i}.{part}"] = torch.cat([present, rest], 2)
        return outputs

    def _last(self, hidden: torch.Tensor) -> _Tensors:
        return {"logits": self._decoder.lm_head(self._decoder.norm(hidden[:, -1:]))}

    def _onward(self, span: Component, hidden: torch.Tensor, recorder: SpanRecorder) -> _Tensors:
        """What a span hands over: hidden states, and the states of its last layer seen as heads."""
        ((layer, scored),) = recorder.projections.items()
        if f"{Source.ATTENTION.value}_states" in {spec.name for spec in span.outputs}:
            scored = {**scored, Source.ATTENTION: recorder.attention(layer, self._dims)[None]}
        states = {
            f"{source.value}_states": output.reshape(*output.shape[:2], state_heads(source, self._dims), -1)
            for source, output in scored.items()
        }
        return {"hidden_states": hidden, **states}

    def _prune(self, prune: Component, feeds: _Tensors, kept: NDArray[np.int64] | None) -> _Tensors:
        hidden, index = feeds["hidden"], feeds["visual_index"]
        k = len(feeds["keep_slots"]) if "keep_slots" in feeds else 0
        assert prune.chooser is not None  # noqa: S101 - read_manifest checks
        choice = choose(prune.chooser, prune_tokens(prune, self._dims, feeds), k)
        if kept is None:
            rows = staying(hidden.shape[1], index, choice.kept)
        else:
            rows = torch.from_numpy(np.array(kept))
        outputs = {
            "kept_hidden": hidden[:, rows],
            "kept_position_ids": feeds["position_ids"][..., rows],
            "kept_index": rows,
            "kept_visual_index": torch.isin(rows, index).nonzero()[:, 0],
        }
        return outputs if choice.scores is None else {**outputs, "scores": choice.scores}

    def _tensor(self, feed: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(feed))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def prune_tokens(component: Component, dims: DecoderDims, feeds: Mapping[str, Any]) -> CutTokens:
    """What the chooser of a prune component looks at.

    Args:
        component: The component.
        dims: The decoder's dimensions.
        feeds: Its inputs by name, as arrays or tensors.
    """
    if component.chooser is None:
        raise ValueError(f"component {component.name} chooses nothing")
    tensors = {name: torch.as_tensor(feed) for name, feed in feeds.items()}
    projections = {}
    source = scored_source(component.chooser)
    if "states" in tensors and source is not None:
        projections[source] = tensors["states"][0].flatten(1)
    return cut_tokens(
        Cut(0, component.chooser),  # which layer it stands before does not matter here
        dims,
        hidden=tensors["hidden"][0],
        projections=projections,
        visual_index=tensors["visual_index"],
    )


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
    """On the host, floats as float32."""
    widened = tensor.float() if tensor.is_floating_point() else tensor
    array: NDArray[Any] = widened.detach().cpu().numpy().copy()
    return array

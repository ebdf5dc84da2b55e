"""Entropies and metrics of the visual tokens, layer by layer while they are computed; no state is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ep_export.entropy import METRICS, LayerTokens, layer_entropy, spectrum_entropy

if TYPE_CHECKING:
    from ep_export.families.base import DecoderModules

__all__ = ["LayerCurves", "record_curves"]

_MOST_TOKENS = 1024
"""Visual tokens that the metrics of hidden states look at, evenly spread: their cost grows with the cube."""


@dataclass
class LayerCurves:
    """One number a layer, in their order.

    Attributes:
        query_entropy: [L] nats.
        key_entropy: [L] nats.
        metrics: Key of every `LayerMetric` -> [L]; empty unless asked for.
    """

    query_entropy: list[float] = field(default_factory=list)
    key_entropy: list[float] = field(default_factory=list)
    metrics: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        rows = [self.query_entropy, self.key_entropy, *self.metrics.values()]
        return all(math.isfinite(value) for row in rows for value in row)


def record_curves(
    decoder: DecoderModules, visual: torch.Tensor, prompt_length: int, undo: ExitStack, *, metrics: bool
) -> LayerCurves:
    """Hook the decoder in, so that its next pass fills what is returned; `undo` removes the hooks.

    Args:
        decoder: The model's decoder.
        visual: [N] int64 prompt positions.
        prompt_length: S; what is fed after the prompt is left out.
        undo: Removes every hook.
        metrics: Also compute the metrics, which cost about as much as the entropies.
    """
    wanted = METRICS if metrics else ()
    curves = LayerCurves(metrics={metric.key: [] for metric in wanted})
    prompt = torch.arange(prompt_length, device=visual.device)
    text = prompt[~torch.isin(prompt, visual)]
    some = visual[:: -(-len(visual) // _MOST_TOKENS)]
    entering: list[torch.Tensor] = []

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering[:] = [args[0] if args else kwargs["hidden_states"]]

    def queries(_module: Any, _args: Any, output: torch.Tensor) -> None:
        hidden = entering[0][0]
        tokens = LayerTokens(output.to(visual.device)[0, visual], hidden[some], hidden[text])
        curves.query_entropy.append(spectrum_entropy(tokens.query_spectrum))
        for metric in wanted:
            curves.metrics[metric.key].append(metric.compute(tokens))

    def keys(_module: Any, _args: Any, output: torch.Tensor) -> None:
        curves.key_entropy.append(layer_entropy(output.to(visual.device)[0, visual]))

    for layer in decoder.layers:
        attention: Any = layer.self_attn
        undo.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        undo.callback(attention.q_proj.register_forward_hook(queries).remove)
        undo.callback(attention.k_proj.register_forward_hook(keys).remove)
    return curves

"""Which cuts are compared: every feasible layer and chooser, and random tokens as the floor of each layer."""

from __future__ import annotations

from collections.abc import Sequence

from ep_export.calibrate.record import RANDOM
from ep_export.errors import UsageError
from ep_export.measure.ways import Way, one_cut
from ep_export.plan import check_schedule
from ep_export.policy import Chooser, Cut, Keep, MaxMin, Random, Schedule, Scorer, Select, TopK

__all__ = ["RANDOM_DRAWS", "candidate_layers", "candidate_ways"]

RANDOM_DRAWS = 3
"""Random selections a question and layer. The interval over pictures carries what noise is left."""

_CHOOSERS: tuple[Chooser, ...] = (*(TopK(scorer, select) for scorer in Scorer for select in Select), MaxMin())


def candidate_layers(keep: Keep, layers: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """Layers at which `keep` is possible: K / L <= keep.

    Args:
        keep: Average over layers; for a number of tokens all layers pass here, since it depends on the
            picture.
        layers: L.
        wanted: Only these; all from 0 when None.

    Raises:
        UsageError: A wanted layer is out of range, or none is possible.
    """
    tried = sorted(set(wanted)) if wanted is not None else range(layers)
    for layer in tried:
        check_schedule(Schedule((Cut(layer, Random()),)), layers)
    if keep.tokens is not None:
        return tuple(tried)
    possible = tuple(
        layer for layer in tried if one_cut(layer, RANDOM, keep).fits(layers=layers, visual_tokens=layers)
    )
    if not possible:
        one_cut(min(tried), RANDOM, keep).kept(layers=layers, visual_tokens=layers)  # raises, naming why
        raise UsageError(f"no layer of {layers} can be pruned to keep {keep}")  # unreachable
    return possible


def candidate_ways(layers: Sequence[int], keep: Keep) -> tuple[Way, ...]:
    """Everything that is compared at these layers, the floor last at each.

    Before the decoder (layer 0) no layer has projected anything that could be scored.
    """
    return tuple(
        one_cut(layer, chooser.name, keep)
        for layer in layers
        for chooser in (*_CHOOSERS, Random())
        if layer > 0 or not isinstance(chooser, TopK)
    )

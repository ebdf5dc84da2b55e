"""Which schedules are compared: every layer and chooser, a second cut at the horizon, random as the floor."""

from __future__ import annotations

from collections.abc import Sequence

from ep_export.calibrate.horizon import Horizon
from ep_export.calibrate.record import RANDOM
from ep_export.errors import UsageError
from ep_export.measure.ways import Way, WayCut, one_cut
from ep_export.methods.ours import CHOOSER_METHODS
from ep_export.planning import check_schedule
from ep_export.policy import Chooser, Cut, Keep, Nothing, Random, Schedule, reads_projections

__all__ = ["RANDOM_DRAWS", "candidate_layers", "candidate_ways", "two_cut_ways"]

RANDOM_DRAWS = 3
"""Random selections a question and layer. The interval over pictures carries what noise is left."""

_CHOOSERS: tuple[Chooser, ...] = tuple(
    method.chooser for method in CHOOSER_METHODS if method.chooser is not None and not method.chance
)

_SECOND_SHARE = 0.25
"""Of the first cut's tokens, how many a random second cut keeps."""


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


def candidate_ways(layers: Sequence[int], keep: Keep, also: Sequence[Chooser] = ()) -> tuple[Way, ...]:
    """Every single cut that is compared at these layers, the floor last at each.

    Before the decoder (layer 0) no layer has projected anything that could be scored.

    Args:
        layers: Where.
        keep: Average over layers.
        also: What is compared besides, e.g. by attention.
    """
    return tuple(
        one_cut(layer, chooser.name, keep)
        for layer in layers
        for chooser in dict.fromkeys((*_CHOOSERS, *also, Random()))
        if layer > 0 or not reads_projections(chooser)
    )


def two_cut_ways(first: Sequence[Way], horizon: Horizon, *, layers: int) -> tuple[Way, ...]:
    """Every single cut again, with a second one at the horizon that drops tokens without looking.

    The second drops all that is left, or keeps a quarter of it at random; at the same average more tokens
    then go on after the first.

    Args:
        first: Single cuts of one keep; the floor has no second.
        horizon: Without a horizon there is nothing to add.
        layers: L.
    """
    deep = sorted({horizon.half.horizon, horizon.everything.horizon} - {None})  # type: ignore[type-var]
    seconds = [(at, Nothing().name, 0.0) for at in deep if at is not None]
    if horizon.half.horizon is not None:
        seconds.append((horizon.half.horizon, RANDOM, _SECOND_SHARE))
    ways = []
    for way in first:
        cut = way.cuts[0]
        for at, method, part in seconds:
            if cut.method == RANDOM or cut.layer >= at or (method == RANDOM and at == layers - 1):
                continue
            share = _first_share(way.keep, cut.layer, at, part, layers)
            if share is not None:
                second = WayCut(at, method, None if method == Nothing().name else share * part)
                ways.append(Way((WayCut(cut.layer, cut.method, share), second), way.keep))
    return tuple(ways)


def _first_share(keep: Keep, layer: int, second: int, part: float, layers: int) -> float | None:
    """Share after the first cut at which the average is `keep`; None where no share up to 1 reaches it.

    With a number of tokens it depends on the picture, and any share will do: all scale together.
    """
    if keep.ratio is None:
        return 0.5
    share = (layers * keep.ratio - layer) / (second - layer + part * (layers - second))
    return round(share, 6) if 0 < share < 1 else None

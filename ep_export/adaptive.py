"""A budget that adapts: every prompt keeps its own number of tokens, from its own scores.

A token goes on where its score is at least a threshold, the same for all prompts. The threshold is fitted to
calibration pictures so that their average is the keep that was asked for; a floor and a ceiling hold every
prompt between half and twice of it. Scores are those of the cut's chooser: of a `TopK` what it ranks by, of a
set chooser what a token added when it was taken, which only falls, so that a threshold cuts its order off.
NumPy only: the host decides k, then has the prune component keep as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UsageError, UserError
from ep_export.planning import kept_tokens
from ep_export.policy import (
    Budget,
    Coverage,
    Cut,
    Keep,
    MaxMin,
    Schedule,
    Select,
    Threshold,
    TopK,
    chooser_named,
)

if TYPE_CHECKING:
    from ep_export.policy import Chooser

__all__ = [
    "adaptive_schedule",
    "bounds",
    "check_adaptive",
    "decides",
    "fit_threshold",
    "most_tokens",
    "own_tokens",
]

_FLOOR, _CEILING = 0.5, 2.0
"""Of the average. A prompt that scores unlike every calibration picture still keeps something, and none costs
more than twice what was planned."""


def adaptive_schedule(threshold: Threshold) -> Schedule:
    """The one cut that a threshold is for."""
    return Schedule((Cut(threshold.layer, chooser_named(threshold.policy)),))


def check_adaptive(keep: Keep, schedule: Schedule) -> None:
    """Refuse a keep of every prompt's own where the schedule has no scores that decide it.

    Raises:
        UsageError: Several cuts, a chooser without a threshold, or not the one the threshold is for.
    """
    if keep.threshold is None:
        return
    _check_schedule(schedule)
    cut, fitted = schedule.cuts[0], keep.threshold
    if (cut.layer, cut.chooser.name) != (fitted.layer, fitted.policy):
        raise UsageError(
            f"the adaptive keep is for policy {fitted.policy} at layer {fitted.layer}, and tokens are pruned "
            f"by {cut.chooser.name} at layer {cut.layer}",
            hint=f"use that policy, or a fixed --keep {keep.ratio:g}",
        )


def bounds(keep: Keep, schedule: Schedule, *, layers: int, visual_tokens: int) -> tuple[int, int]:
    """Fewest and most tokens that a prompt keeps at the cut.

    Args:
        keep: With a threshold.
        schedule: Of one cut.
        layers: L.
        visual_tokens: N, at least 1.

    Raises:
        UsageError: See `check_adaptive` and `kept_tokens`.
    """
    check_adaptive(keep, schedule)
    if keep.threshold is None:
        raise ValueError("this keep is the same for every prompt")
    return _bounds(keep.threshold, schedule, layers, visual_tokens)


def most_tokens(average: float, schedule: Schedule, *, layers: int, visual_tokens: int) -> int:
    """Most tokens that a prompt may keep at the cut, whatever the threshold turns out to be.

    Raises:
        UsageError: Nothing that the schedule scores decides a keep, or the average is impossible.
    """
    _check_schedule(schedule)
    ceiling = Keep(ratio=min(_CEILING * average, 1.0))
    return kept_tokens(ceiling, schedule, layers=layers, visual_tokens=visual_tokens)[0]


def own_tokens(
    keep: Keep, scores: NDArray[Any], schedule: Schedule, *, layers: int, visual_tokens: int
) -> int:
    """How many tokens this prompt keeps at the cut.

    Args:
        keep: With a threshold.
        scores: [N] of the visual tokens; of a set chooser those of a choice of at least as many tokens as
            `bounds` says a prompt keeps at most.
        schedule: Of one cut.
        layers: L.
        visual_tokens: N.
    """
    if keep.threshold is None:
        raise ValueError("this keep is the same for every prompt")
    chooser = schedule.cuts[0].chooser
    low, high = bounds(keep, schedule, layers=layers, visual_tokens=visual_tokens)
    good = _goodness(scores, chooser) >= _goodness(np.array([keep.threshold.value]), chooser)
    return int(np.clip(int(good.sum()), low, high))


def fit_threshold(
    average: float, schedule: Schedule, pictures: Sequence[NDArray[Any]], *, layers: int
) -> Keep:
    """The keep whose threshold comes to an average over pictures.

    The threshold lies half-way between two scores, so that no token of these pictures ties with it. k is a
    whole number, so the average is met as nearly as one token more or less on one picture allows.

    Args:
        average: Share of the visual tokens, over all layers and pictures.
        schedule: Of one cut.
        pictures: Of every picture the scores [N] of its visual tokens, all of them in order.
        layers: L.

    Raises:
        UsageError: The average is impossible, or nothing that the schedule scores decides it.
        UserError: There is no picture with a score.
    """
    _check_schedule(schedule)
    kept_tokens(Keep(ratio=average), schedule, layers=layers, visual_tokens=layers)  # refuses what no k meets
    cut = schedule.cuts[0]
    good = [_goodness(scores, cut.chooser) for scores in pictures]
    known = np.unique(np.concatenate([np.zeros(0), *(one[np.isfinite(one)] for one in good)]))
    if not len(known):
        raise UserError(
            "an adaptive keep needs pictures to be fitted to, and none has a score",
            hint="calibrate on pictures whose visual tokens are finite",
        )
    least = cut.layer / layers
    floor = max(_FLOOR * average, least)
    ceiling = min(_CEILING * average, 1.0)
    sign = -1.0 if _keeps_lowest(cut.chooser) else 1.0

    def keep_at(value: float) -> Threshold:
        return Threshold(cut.layer, cut.chooser.name, sign * value, floor, ceiling, len(pictures))

    def reached(value: float) -> float:
        return _average(keep_at(value), good, schedule, layers, value)

    # above a threshold that is too low, more is kept than asked for: the highest that still reaches it
    edges = np.concatenate([[known[0] - 1.0], (known[1:] + known[:-1]) / 2, [known[-1] + 1.0]])
    low, high = 0, len(edges) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if reached(float(edges[middle])) >= average else (low, middle - 1)
    near = min(edges[low : low + 2].tolist(), key=lambda value: abs(reached(value) - average))
    return Keep(ratio=average, adaptive=True, threshold=keep_at(near))


def decides(chooser: Chooser) -> bool:
    """Whether the chooser's scores can say how many tokens stay."""
    if isinstance(chooser, TopK):
        return chooser.budget is Budget.JOINT
    return isinstance(chooser, MaxMin | Coverage)


def _check_schedule(schedule: Schedule) -> None:
    if len(schedule.cuts) != 1:
        raise UsageError(
            f"an adaptive keep goes with one cut, the schedule has {len(schedule.cuts)}",
            hint="prune at one layer, or give a fixed --keep",
        )
    chooser = schedule.cuts[0].chooser
    if not decides(chooser):
        raise UsageError(
            f"policy {chooser.name} has no scores that an adaptive keep could go by",
            hint="give a policy that scores tokens jointly, e.g. norm-highest, divprune or "
            "coverage-norm-highest",
        )


def _average(
    threshold: Threshold, good: Sequence[NDArray[np.float64]], schedule: Schedule, layers: int, value: float
) -> float:
    """Mean over pictures of the share of visual tokens over all layers."""
    first, shares = schedule.cuts[0].layer, []
    for scores in good:
        low, high = _bounds(threshold, schedule, layers, len(scores))
        k = float(np.clip(int((scores >= value).sum()), low, high))
        shares.append((first + (layers - first) * k / len(scores)) / layers)
    return float(np.mean(shares))


def _bounds(threshold: Threshold, schedule: Schedule, layers: int, visual_tokens: int) -> tuple[int, int]:
    low, high = (
        kept_tokens(Keep(ratio=ratio), schedule, layers=layers, visual_tokens=visual_tokens)[0]
        for ratio in (threshold.floor, threshold.ceiling)
    )
    return low, high


def _keeps_lowest(chooser: Chooser) -> bool:
    """Whether lower scores are better; those of a Coverage are products, of which high is good."""
    return isinstance(chooser, TopK) and chooser.select is Select.LOWEST


def _goodness(scores: NDArray[Any], chooser: Chooser) -> NDArray[np.float64]:
    """Scores in float64, higher is better; what is not finite is worst."""
    values = np.asarray(scores, dtype=np.float64)
    values = -values if _keeps_lowest(chooser) else values
    return np.where(np.isfinite(values), values, -np.inf)

"""From per-picture fidelities to a table with intervals, and from the table to a cut or an honest none.

NumPy only. Every comparison is paired: the same resampled pictures for both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ep_export.calibrate.record import RANDOM, Candidate
from ep_export.policy import Cut, Schedule, TopK, chooser_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ep_export.measure.ways import Way, WayCut

__all__ = ["MARGIN", "Fidelity", "Recommendation", "recommend", "table"]

RESAMPLES = 10_000
"""Leaves about 4 resamples in the tail that 64 ways compared with random share."""

MARGIN = 1.1
"""A way counts as equal to the best one only if, besides not being worse for sure, its mean KL is at most
10% larger: with few pictures nearly everything is "not worse for sure"."""

_TAIL = 0.025
"""Below a two-sided 95% interval."""

MIN_IMAGES = 4
"""Fewer pictures cannot carry a 95% interval, hence no recommendation."""


@dataclass(frozen=True)
class Fidelity:
    """Per-picture measurements.

    Attributes:
        ways: What was measured, in column order: ways of one cut.
        kl: [images, ways] mean KL over each picture's answer positions.
        agreement: [images, ways] share of positions with the same top token.
    """

    ways: tuple[Way, ...]
    kl: NDArray[np.float64]
    agreement: NDArray[np.float64]

    @property
    def cuts(self) -> tuple[WayCut, ...]:
        """The cut of every way."""
        return tuple(way.cuts[0] for way in self.ways)


@dataclass(frozen=True)
class Recommendation:
    """What the table says.

    Attributes:
        schedule: What to use, None when nothing beats random.
        confidence: Share of resamples in which it has the lowest mean KL; None without a schedule.
        reason: One sentence.
    """

    schedule: Schedule | None
    confidence: float | None
    reason: str


def table(fidelity: Fidelity, *, keep: float, seed: int = 0) -> tuple[Candidate, ...]:
    """The candidates with 95% bootstrap intervals of their mean KL, in column order."""
    means = _resampled_means(fidelity.kl, seed)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return tuple(
        Candidate(
            layer=cut.layer,
            policy=cut.method,
            keep=keep,
            kl=float(fidelity.kl[:, i].mean()),
            top1_agreement=float(fidelity.agreement[:, i].mean()),
            kl_low=float(low[i]),
            kl_high=float(high[i]),
        )
        for i, cut in enumerate(fidelity.cuts)
    )


def recommend(fidelity: Fidelity, *, seed: int = 0) -> Recommendation:
    """Choose a cut.

    A way may be recommended only if its KL is below that of random tokens at the same layer: the interval of
    the paired difference is above 0, at 95% for all ways together (Bonferroni), because among 50 useless ways
    one or two pass a single 95% test. And its mean must be below that of random tokens at every other layer,
    else pruning at random there would be better.

    Among those the lowest mean KL leads, top-1 agreement breaking ties. Ways equal to it (interval of the
    paired difference reaches 0, mean at most 10% larger) are then put in this order: the published one
    (paper-highest), then the earlier layer (at the same average it costs about the same, and it leaves room
    for smaller keeps), then the lower KL.

    Args:
        fidelity: The measurements; every layer needs its random column.
        seed: Of the resampling.
    """
    images = len(fidelity.kl)
    if images < MIN_IMAGES:
        return Recommendation(
            None, None, f"{images} pictures are too few to tell policies apart, {MIN_IMAGES} are needed"
        )
    means = _resampled_means(fidelity.kl, seed)
    mean, agreement = fidelity.kl.mean(axis=0), fidelity.agreement.mean(axis=0)
    cuts = fidelity.cuts
    columns = [i for i, cut in enumerate(cuts) if cut.method != RANDOM]
    level = _TAIL / len(columns)
    lowest_floor = min(mean[_floor(cuts, i)] for i in columns)
    able = [i for i in columns if mean[i] < lowest_floor and _surely_below(means, i, _floor(cuts, i), level)]
    if not able:
        return Recommendation(None, None, _nothing(cuts, mean))
    best = min(able, key=lambda i: (mean[i], -agreement[i]))
    equal = [i for i in able if mean[i] <= MARGIN * mean[best] and not _surely_below(means, best, i, _TAIL)]
    chosen = min({best, *equal}, key=lambda i: _preference(cuts[i], float(mean[i])))
    # two ways may keep the same tokens of every picture: a tie is a win
    confidence = float((means[:, chosen] <= means[:, columns].min(axis=1) + 1e-12).mean())
    return Recommendation(_schedule(cuts[chosen]), confidence, _why(cuts, mean, chosen, best, confidence))


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """[resamples, ways] means over pictures drawn with replacement."""
    images = len(values)
    draws = np.random.default_rng(seed).integers(images, size=(RESAMPLES, images))
    weights = np.stack([np.bincount(draw, minlength=images) for draw in draws]) / images
    return np.asarray(weights @ values)


def _surely_below(means: NDArray[np.float64], lower: int, upper: int, tail: float) -> bool:
    """Whether all but the lowest `tail` of the paired differences upper - lower lie above 0."""
    return bool(np.quantile(means[:, upper] - means[:, lower], tail) > 0)


def _floor(cuts: Sequence[WayCut], column: int) -> int:
    layer = cuts[column].layer
    return next(i for i, cut in enumerate(cuts) if cut.method == RANDOM and cut.layer == layer)


def _preference(cut: WayCut, kl: float) -> tuple[bool, int, float]:
    return (cut.method != TopK().name, cut.layer, kl)


def _schedule(cut: WayCut) -> Schedule:
    return Schedule((Cut(cut.layer, chooser_named(cut.method)),))


def _name(cut: WayCut) -> str:
    return f"{cut.method} at layer {cut.layer}"


def _why(cuts: Sequence[WayCut], mean: NDArray[np.float64], chosen: int, best: int, confidence: float) -> str:
    floor = mean[_floor(cuts, chosen)]
    text = f"{_name(cuts[chosen])}: KL {mean[chosen]:.3g} against {floor:.3g} of random tokens there"
    if chosen != best:
        text += f", not told apart from {_name(cuts[best])} ({mean[best]:.3g})"
    return f"{text}; best in {confidence:.0%} of resamples"


def _nothing(cuts: Sequence[WayCut], mean: NDArray[np.float64]) -> str:
    best = min((i for i, cut in enumerate(cuts) if cut.method != RANDOM), key=lambda i: mean[i])
    floor = min((i for i, cut in enumerate(cuts) if cut.method == RANDOM), key=lambda i: mean[i])
    return (
        f"no policy beats random tokens for sure: {_name(cuts[best])} has KL {mean[best]:.3g}, "
        f"random tokens reach {mean[floor]:.3g} at layer {cuts[floor].layer}"
    )

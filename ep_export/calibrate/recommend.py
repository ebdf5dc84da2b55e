"""From per-picture fidelities to a table with intervals, and from the table to a schedule or an honest none.

NumPy only. Every comparison is paired: the same resampled pictures for both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ep_export.calibrate.horizon import NOISE_KL
from ep_export.calibrate.race import Fidelity, is_floor, resampled_means
from ep_export.calibrate.record import Candidate
from ep_export.policy import TopK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ep_export.measure.ways import Way
    from ep_export.policy import Schedule

__all__ = ["MARGIN", "Recommendation", "recommend", "table"]

RESAMPLES = 10_000
"""Leaves about 4 resamples in the tail that 64 ways compared with random share."""

MARGIN = 1.1
"""A way counts as equal to the best one only if, besides not being worse for sure, its mean KL is at most
10% larger: with few pictures nearly everything is "not worse for sure"."""

_TAIL = 0.025
"""Below a two-sided 95% interval."""

_Z = 1.96
"""The same in standard errors."""

MIN_IMAGES = 4
"""Fewer pictures cannot carry a 95% interval, hence no recommendation."""


@dataclass(frozen=True)
class Recommendation:
    """What the table says.

    Attributes:
        schedule: What to use, None when nothing beats random.
        confidence: Share of resamples in which it has the lowest mean KL of all that ran to the end; None
            without a schedule.
        reason: One sentence.
        images_needed: Pictures that could tell it apart from its closest rival; None where it is told apart,
            or where what there is between them is noise.
    """

    schedule: Schedule | None
    confidence: float | None
    reason: str
    images_needed: int | None = None


def table(fidelity: Fidelity, *, keep: float, seed: int = 0) -> tuple[Candidate, ...]:
    """The candidates with 95% bootstrap intervals of their mean KL, in column order.

    Args:
        fidelity: The measurements.
        keep: The average that was measured, as a ratio.
        seed: Of the resampling.
    """
    rows = []
    for i, (way, images) in enumerate(zip(fidelity.ways, fidelity.images, strict=True)):
        kl = fidelity.kl[:images, i : i + 1]
        low, high = np.quantile(resampled_means(kl, seed, RESAMPLES), [_TAIL, 1 - _TAIL])
        cuts = way.schedule.cuts
        rows.append(
            Candidate(
                layer=cuts[0].layer,
                policy=way.cuts[0].method,
                keep=keep,
                kl=float(kl.mean()),
                top1_agreement=float(fidelity.agreement[:images, i].mean()),
                kl_low=float(low),
                kl_high=float(high),
                images=int(images),
                share=cuts[0].share,
                second=cuts[1] if len(cuts) > 1 else None,
            )
        )
    return tuple(rows)


def recommend(fidelity: Fidelity, *, seed: int = 0) -> Recommendation:
    """Choose a schedule among those that ran to the end.

    A way may be recommended only if its KL is below that of random tokens dropped once at its first layer:
    the interval of the paired difference is above 0, at 95% for all ways together (Bonferroni), because among
    50 useless ways one or two pass a single 95% test. And its mean must be below that of random tokens at
    every other layer, else pruning at random there would be better.

    Among those the lowest mean KL leads, top-1 agreement breaking ties. Ways equal to it (interval of the
    paired difference reaches 0, mean at most 10% larger) are then put in this order: the published one
    (paper-highest), then a single cut before two, then the earlier layer (at the same average it costs about
    the same, and it leaves room for smaller keeps), then the lower KL.

    Args:
        fidelity: The measurements; every layer needs its random column.
        seed: Of the resampling.
    """
    images = len(fidelity.kl)
    if images < MIN_IMAGES:
        return Recommendation(
            None, None, f"{images} pictures are too few to tell policies apart, {MIN_IMAGES} are needed"
        )
    paired = _Paired(fidelity, seed)
    ways, mean = fidelity.ways, paired.mean
    columns = [i for i in fidelity.finalists if not is_floor(ways[i])]
    able = [i for i in columns if paired.beats_random(i)]
    if not able:
        return Recommendation(None, None, _nothing(ways, mean))
    best = min(able, key=lambda i: (mean[i], -fidelity.agreement[:, i].mean()))
    equal = [i for i in able if mean[i] <= MARGIN * mean[best] and not paired.surely_below(best, i)]
    chosen = min({best, *equal}, key=lambda i: _preference(ways[i], float(mean[i])))
    # two ways may keep the same tokens of every picture: a tie is a win
    resampled = paired.means(columns)
    won = resampled[:, columns.index(chosen)] <= resampled.min(axis=1) + 1e-12
    rivals = [i for i in columns if i not in (chosen, best) and not paired.surely_below(chosen, i)]
    rival = min(rivals, key=lambda i: mean[i]) if rivals else None
    needed = None if rival is None else _images_needed(fidelity.kl[:, rival] - fidelity.kl[:, chosen])
    return Recommendation(
        schedule=ways[chosen].schedule,
        confidence=float(won.mean()),
        reason=_why(fidelity, paired, chosen, best, rival, float(won.mean()), needed),
        images_needed=needed,
    )


class _Paired:
    """Differences of ways on the pictures that both were measured on."""

    def __init__(self, fidelity: Fidelity, seed: int) -> None:
        self._fidelity, self._seed = fidelity, seed
        self._ways = sum(not is_floor(way) for way in fidelity.ways)
        self.mean = np.nanmean(fidelity.kl, axis=0)
        self.floors = {w.cuts[0].layer: i for i, w in enumerate(fidelity.ways) if is_floor(w)}

    def floor(self, column: int) -> int:
        """Column of the random tokens at its first layer."""
        return self.floors[self._fidelity.ways[column].cuts[0].layer]

    def means(self, columns: Sequence[int]) -> NDArray[np.float64]:
        """[resamples, columns] on the pictures that all were measured on."""
        rows = int(self._fidelity.images[list(columns)].min())
        return resampled_means(self._fidelity.kl[:rows, list(columns)], self._seed, RESAMPLES)

    def surely_below(self, lower: int, upper: int, tail: float = _TAIL) -> bool:
        """Whether all but the lowest `tail` of the resampled differences upper - lower lie above 0."""
        means = self.means([lower, upper])
        return bool(np.quantile(means[:, 1] - means[:, 0], tail) > 0)

    def beats_random(self, column: int) -> bool:
        """See `recommend`."""
        kl, images = self._fidelity.kl, self._fidelity.images
        lower = all(kl[: images[f], column].mean() < kl[: images[f], f].mean() for f in self.floors.values())
        return lower and self.surely_below(column, self.floor(column), _TAIL / self._ways)


def _images_needed(difference: NDArray[np.float64]) -> int | None:
    """Pictures at which so large a mean difference would be sure; None where it is noise."""
    mean = float(difference.mean())
    if abs(mean) < NOISE_KL:
        return None
    needed = math.ceil((_Z * float(difference.std(ddof=1)) / mean) ** 2)
    return max(needed, len(difference) + 1)  # the interval, which is not symmetric, was not sure yet


def _preference(way: Way, kl: float) -> tuple[bool, int, int, float]:
    cuts = way.cuts
    published = len(cuts) == 1 and cuts[0].method == TopK().name
    return (not published, len(cuts), cuts[0].layer, kl)


def _name(way: Way) -> str:
    return ", then ".join(f"{cut.method} at layer {cut.layer}" for cut in way.cuts)


def _why(
    fidelity: Fidelity,
    paired: _Paired,
    chosen: int,
    best: int,
    rival: int | None,
    confidence: float,
    needed: int | None,
) -> str:
    ways, mean = fidelity.ways, paired.mean
    floor = mean[paired.floor(chosen)]
    text = f"{_name(ways[chosen])}: KL {mean[chosen]:.3g} against {floor:.3g} of random tokens"
    if chosen != best:
        text += f", not told apart from {_name(ways[best])} ({mean[best]:.3g})"
    text += f"; best in {confidence:.0%} of resamples"
    if rival is None:
        return f"{text}; all others are worse for sure"
    text += f"; next {_name(ways[rival])} ({mean[rival]:.3g})"
    if needed is None:
        return f"{text}, less than {NOISE_KL:g} nats apart: more pictures would change nothing that matters"
    return f"{text}: more pictures needed to tell them apart, about {needed}"


def _nothing(ways: Sequence[Way], mean: NDArray[np.float64]) -> str:
    best = min((i for i, way in enumerate(ways) if not is_floor(way)), key=lambda i: mean[i])
    floor = min((i for i, way in enumerate(ways) if is_floor(way)), key=lambda i: mean[i])
    return (
        f"no policy beats random tokens for sure: {_name(ways[best])} has KL {mean[best]:.3g}, "
        f"random tokens reach {mean[floor]:.3g} at layer {ways[floor].cuts[0].layer}"
    )

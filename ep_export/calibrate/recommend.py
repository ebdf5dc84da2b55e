"""From per-picture fidelities to a table with intervals, and from the table to a schedule or an honest none.

NumPy only. Every comparison is paired: the same resampled pictures for both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ep_export.calibrate.horizon import NOISE_KL
from ep_export.calibrate.race import Fidelity, is_floor
from ep_export.calibrate.record import Candidate
from ep_export.calibrate.statistics import resampled_means
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
        images_needed: Pictures that could tell it apart from its closest rival, or show that only noise lies
            between them; None where either is sure.
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
    (paper-highest), then the earlier layer (at the same average it costs about the same, and it leaves room
    for smaller keeps), then the leader's own first chooser, with a second cut before without (it lies at the
    horizon, so that at the same average more tokens go through the layers that look), then the lower KL.

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
    chosen = min({best, *equal}, key=lambda i: (*_preference(ways[i], ways[best]), mean[i]))
    # two ways may keep the same tokens of every picture: a tie is a win
    resampled = paired.means(columns)
    won = resampled[:, columns.index(chosen)] <= resampled.min(axis=1) + 1e-12
    confidence = float(won.mean())
    said, needed = _separation(paired, chosen, [i for i in columns if i != chosen])
    reasons = [_against_random(paired, chosen, best), f"best in {confidence:.0%} of resamples", *said]
    return Recommendation(ways[chosen].schedule, confidence, "; ".join(reasons), needed)


class _Paired:
    """Differences of ways on the pictures that both were measured on."""

    def __init__(self, fidelity: Fidelity, seed: int) -> None:
        self._images, self._seed = fidelity.images, seed
        self.ways, self.kl = fidelity.ways, fidelity.kl
        self._tail = _TAIL / sum(not is_floor(way) for way in fidelity.ways)
        self.mean = np.nanmean(fidelity.kl, axis=0)
        self.floors = {w.cuts[0].layer: i for i, w in enumerate(fidelity.ways) if is_floor(w)}

    def floor(self, column: int) -> int:
        """Column of the random tokens at its first layer."""
        return self.floors[self.ways[column].cuts[0].layer]

    def means(self, columns: Sequence[int]) -> NDArray[np.float64]:
        """[resamples, columns] on the pictures that all were measured on."""
        rows = int(self._images[list(columns)].min())
        return resampled_means(self.kl[:rows, list(columns)], self._seed, RESAMPLES)

    def surely_below(self, lower: int, upper: int, tail: float = _TAIL) -> bool:
        """Whether all but the lowest `tail` of the resampled differences upper - lower lie above 0."""
        means = self.means([lower, upper])
        return bool(np.quantile(means[:, 1] - means[:, 0], tail) > 0)

    def surely_within(self, one: int, other: int, noise: float) -> bool:
        """Whether the 95% interval of the difference lies within plus or minus `noise`."""
        means = self.means([one, other])
        ends = np.quantile(means[:, 1] - means[:, 0], [_TAIL, 1 - _TAIL])
        return bool(np.abs(ends).max() <= noise)

    def beats_random(self, column: int) -> bool:
        """See `recommend`."""
        kl, images = self.kl, self._images
        lower = all(kl[: images[f], column].mean() < kl[: images[f], f].mean() for f in self.floors.values())
        return lower and self.surely_below(column, self.floor(column), self._tail)


def _separation(paired: _Paired, chosen: int, others: Sequence[int]) -> tuple[list[str], int | None]:
    """What is not told apart from the chosen way: how many, and the pictures that could tell the next best.

    Differences that lie within noise for sure hardly matter. For the others so many pictures are needed that
    the interval of a difference either leaves out 0 or lies within noise.
    """
    ways, mean = paired.ways, paired.mean
    rivals = [i for i in others if not paired.surely_below(chosen, i)]
    apart = [i for i in rivals if not paired.surely_within(chosen, i, NOISE_KL)]
    close = len(rivals) - len(apart)
    said = [f"{close} within {NOISE_KL:g} nats of it for sure, which hardly matters"] if close else []
    if not apart:
        return [*said, "all others are worse for sure"], None
    rival = min(apart, key=lambda i: mean[i])
    difference = paired.kl[:, rival] - paired.kl[:, chosen]
    tell = max(abs(float(difference.mean())), NOISE_KL)
    needed = math.ceil((_Z * float(difference.std(ddof=1)) / tell) ** 2)
    needed = max(needed, len(difference) + 1)  # an interval that is not symmetric was not sure yet
    maybe = f"{_name(ways[rival])} ({mean[rival]:.3g}) may be as good"
    return [*said, f"{maybe}, more pictures needed: about {needed}"], needed


def _preference(way: Way, best: Way) -> tuple[bool, int, bool, int]:
    """See `recommend`; the lowest first."""
    first = way.cuts[0]
    published = len(way.cuts) == 1 and first.method == TopK().name
    return (not published, first.layer, first.method != best.cuts[0].method, -len(way.cuts))


def _name(way: Way) -> str:
    return ", then ".join(f"{cut.method} at layer {cut.layer}" for cut in way.cuts)


def _against_random(paired: _Paired, chosen: int, best: int) -> str:
    ways, mean = paired.ways, paired.mean
    floor = mean[paired.floor(chosen)]
    text = f"{_name(ways[chosen])}: KL {mean[chosen]:.3g} against {floor:.3g} of random tokens"
    return text if chosen == best else f"{text}, not told apart from {_name(ways[best])} ({mean[best]:.3g})"


def _nothing(ways: Sequence[Way], mean: NDArray[np.float64]) -> str:
    best = min((i for i, way in enumerate(ways) if not is_floor(way)), key=lambda i: mean[i])
    floor = min((i for i, way in enumerate(ways) if is_floor(way)), key=lambda i: mean[i])
    return (
        f"no policy beats random tokens for sure: {_name(ways[best])} has KL {mean[best]:.3g}, "
        f"random tokens reach {mean[floor]:.3g} at layer {ways[floor].cuts[0].layer}"
    )

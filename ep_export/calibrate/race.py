"""A race over pictures: many ways on a few pictures, the better half on twice as many, and so on to the end.

Successive halving (Jamieson and Talwalkar 2016) costs a fraction of measuring every way on every picture. A
way that is surely worse than the leader by more than noise leaves at once (as in a Hoeffding race; here the
intervals are of paired differences, resampled over pictures). The best two dozen run to the end all the same:
what pruning costs is mostly in a few hard pictures, and the first ones without them look surer than they are.
NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ep_export.calibrate.horizon import NOISE_KL
from ep_export.calibrate.record import RANDOM
from ep_export.calibrate.statistics import resampled_means

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ep_export.measure.ways import Way

__all__ = ["Fidelity", "Leg", "is_floor", "legs", "race"]

FIRST_LEG = 12
"""Pictures before anything is left out: what pruning costs is mostly in a few hard pictures."""

FEWEST = 24
"""Ways that run to the end, however sure their differences look; there is no need to halve further."""

_RESAMPLES = 2000
_TAIL = 0.025


@dataclass(frozen=True)
class Fidelity:
    """Per-picture measurements.

    Attributes:
        ways: What was measured, in column order.
        kl: [images, ways] mean KL over each picture's answer positions; NaN below the last picture that a way
            was measured on.
        agreement: [images, ways] share of positions with the same top token; NaN likewise.
    """

    ways: tuple[Way, ...]
    kl: NDArray[np.float64]
    agreement: NDArray[np.float64]

    @property
    def images(self) -> NDArray[np.int64]:
        """[ways] pictures each was measured on: the first so many rows."""
        counts: NDArray[np.int64] = np.isfinite(self.kl).sum(axis=0, dtype=np.int64)
        return counts

    @property
    def finalists(self) -> tuple[int, ...]:
        """Columns of ways that were measured on every picture."""
        return tuple(int(i) for i in np.flatnonzero(self.images == len(self.kl)))


@dataclass(frozen=True)
class Leg:
    """A part of the race.

    Attributes:
        images: Pictures measured by its end.
        most: Ways that run in it at most, floors left out.
    """

    images: int
    most: int


def legs(images: int, ways: int) -> tuple[Leg, ...]:
    """The parts of a race: twice the pictures and half the ways each time.

    Args:
        images: Pictures there are.
        ways: Ways there are, floors left out.
    """
    planned = []
    reached, most = FIRST_LEG, ways
    while reached < images and most > FEWEST:
        planned.append(Leg(reached, most))
        reached, most = 2 * reached, max(FEWEST, most // 2)
    return (*planned, Leg(images, most))


def race(
    ways: Sequence[Way],
    images: int,
    measure: Callable[[Sequence[Way], range], tuple[NDArray[np.float64], NDArray[np.float64]]],
    *,
    seed: int = 0,
) -> Fidelity:
    """Run it.

    Args:
        ways: Everything that is compared, floors included: a floor runs as long as a way at its layer.
        images: Pictures there are.
        measure: (ways, pictures) -> KL and agreement, each [pictures, ways].
        seed: Of the resampling.
    """
    kl = np.full((images, len(ways)), np.nan)
    agreement = kl.copy()
    columns = [i for i, way in enumerate(ways) if not is_floor(way)]
    start = 0
    for leg in legs(images, len(columns)):
        if start:
            columns = _staying(kl[:start], columns, leg.most, seed)
        running = sorted({*columns, *_floors(ways, columns)})
        part = range(start, leg.images)
        measured = measure([ways[i] for i in running], part)
        kl[np.ix_(part, running)], agreement[np.ix_(part, running)] = measured
        start = leg.images
    return Fidelity(tuple(ways), kl, agreement)


def is_floor(way: Way) -> bool:
    """Whether it is random tokens after a single cut."""
    return len(way.cuts) == 1 and way.cuts[0].method == RANDOM


def _staying(kl: NDArray[np.float64], columns: Sequence[int], most: int, seed: int) -> list[int]:
    """The best: `FEWEST`, and up to `most` that are not surely worse than the leader by more than noise."""
    means = resampled_means(kl[:, columns], seed, _RESAMPLES)
    order = np.argsort(kl[:, columns].mean(axis=0), kind="stable")
    behind = np.quantile(means - means[:, order[:1]], _TAIL, axis=0) > NOISE_KL
    return [columns[i] for rank, i in enumerate(order) if rank < FEWEST or not behind[i]][:most]


def _floors(ways: Sequence[Way], columns: Sequence[int]) -> list[int]:
    layers = {ways[i].cuts[0].layer for i in columns}
    return [i for i, way in enumerate(ways) if is_floor(way) and way.cuts[0].layer in layers]

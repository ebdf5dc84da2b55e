"""The Information Horizon (arXiv 2512.07580): from which layer on dropping visual tokens changes nothing.

There a token's information is the change of the model's answer when it is dropped, and the horizon the layer
where it has become uniform and gone. Here: the first layer from which dropping more, half of the tokens at
random or all of them, stays within the noise of dropping nothing, on the user's own pictures. NumPy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ep_export.calibrate.statistics import floats, resampled_means
from ep_export.measure.ways import Way, WayCut, one_cut
from ep_export.policy import Keep, Nothing, Random, Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "MIN_IMAGES",
    "NOISE_KL",
    "DropCurve",
    "Horizon",
    "before_horizon",
    "find_horizon",
    "horizon_ways",
]

NOISE_KL = 0.01
"""Nats. By Pinsker's inequality no answer's probability then moves by more than 7 points."""

NOISE_TOP1 = 0.01
"""And the answer's tokens stay on top in all but so many places."""

MIN_IMAGES = 8
"""Fewer pictures, resampled, give an interval that is too narrow to stand on."""

_SHARE = 0.5
"""Kept where tokens are dropped at random."""

_MOST_LAYERS = 16
"""Layers that are looked at: deeper models every second or third, always the last."""

_RESAMPLES = 2000
_UPPER = 0.975


@dataclass(frozen=True)
class DropCurve:
    """One way of dropping visual tokens, before one layer after another.

    Attributes:
        layers: Where they were dropped, ascending.
        kl: Mean KL(full || dropped) in nats for each, every picture weighing the same.
        kl_high: Upper ends of its 95% intervals over pictures (bootstrap).
        top1_agreement: Share of answer positions where both models would say the same token.
        horizon: First layer from which on all are within noise for sure; None when there is none.
    """

    layers: tuple[int, ...]
    kl: tuple[float, ...]
    kl_high: tuple[float, ...]
    top1_agreement: tuple[float, ...]
    horizon: int | None


@dataclass(frozen=True)
class Horizon:
    """Where visual tokens have said all they say.

    Attributes:
        images: Pictures this stands on.
        half: Half of the tokens dropped at random.
        everything: All of them dropped.
        finding: One sentence with the numbers.
        kind: Kind of question it is of; None for all.
    """

    images: int
    half: DropCurve
    everything: DropCurve
    finding: str
    kind: str | None = None

    @property
    def layer(self) -> int | None:
        """The first layer from which dropping more, either way, stays within noise."""
        found = [curve.horizon for curve in (self.half, self.everything) if curve.horizon is not None]
        return min(found, default=None)


def horizon_ways(layers: int) -> tuple[tuple[Way, ...], tuple[Way, ...]]:
    """What is measured: half dropped at random, and everything dropped, before every layer but the first.

    Args:
        layers: L.

    Returns:
        Both in the order of their layers.
    """
    step = -(-(layers - 1) // _MOST_LAYERS)
    looked_at = sorted(range(layers - 1, 0, -step))
    half = [
        one_cut(at, Random().name, Keep(ratio=(at + _SHARE * (layers - at)) / layers)) for at in looked_at
    ]
    nothing = [Way((WayCut(at, Nothing().name),), Keep(ratio=at / layers)) for at in looked_at]
    return tuple(half), tuple(nothing)


def find_horizon(
    half: tuple[Sequence[Way], NDArray[np.float64], NDArray[np.float64]],
    everything: tuple[Sequence[Way], NDArray[np.float64], NDArray[np.float64]],
    *,
    kind: str | None = None,
    seed: int = 0,
) -> Horizon:
    """Read the horizon off what was measured.

    Args:
        half: From `horizon_ways`; mean KL over each picture's answer positions and share of positions with
            the same top token, each [images, ways].
        everything: The same.
        kind: Kind of question it is of.
        seed: Of the resampling.
    """
    images = len(half[1])
    curves = [_curve(*one, seed=seed) for one in (half, everything)]
    needed = [_images_needed(curve, images) for curve in curves]
    finding = _finding(curves[0], curves[1], images, needed)
    return Horizon(images, curves[0], curves[1], finding, kind)


def before_horizon(horizon: Horizon | None, schedule: Schedule) -> str | None:
    """A warning where a second cut drops tokens that still say something; None where none is due.

    Args:
        horizon: Of the model; None when it was not measured.
        schedule: Cuts that are to be used.
    """
    if horizon is None or horizon.layer is None:
        return None
    early = [cut.layer for cut in schedule.cuts[1:] if cut.layer < horizon.layer]
    if not early:
        return None
    at = [i for i, layer in enumerate(horizon.everything.layers) if layer <= early[0]]
    cost = f" (dropping all tokens there costs KL {horizon.everything.kl[at[-1]]:.2g})" if at else ""
    return f"the cut at layer {early[0]}{cost} lies before the information horizon, layer {horizon.layer}"


def _curve(
    ways: Sequence[Way], kl: NDArray[np.float64], agreement: NDArray[np.float64], *, seed: int
) -> DropCurve:
    images = len(kl)
    high = np.quantile(resampled_means(kl, seed, _RESAMPLES), _UPPER, axis=0)
    layers = tuple(way.cuts[0].layer for way in ways)
    top1 = agreement.mean(axis=0)
    within = (high <= NOISE_KL) & (top1 >= 1 - NOISE_TOP1)
    return DropCurve(
        layers=layers,
        kl=floats(kl.mean(axis=0)),
        kl_high=floats(high),
        top1_agreement=floats(top1),
        horizon=_first_of_all(layers, within) if images >= MIN_IMAGES else None,
    )


def _first_of_all(layers: Sequence[int], within: NDArray[np.bool_]) -> int | None:
    """The first layer from which on all are within."""
    outside = np.flatnonzero(~within)
    first = int(outside[-1]) + 1 if len(outside) else 0
    return layers[first] if first < len(layers) else None


def _images_needed(curve: DropCurve, images: int) -> tuple[int, int] | None:
    """An earlier horizon that the means show, and pictures that could make sure of it; None without one.

    An interval narrows with the root of the pictures.
    """
    means, top1 = np.array(curve.kl), np.array(curve.top1_agreement)
    likely = _first_of_all(curve.layers, (means < NOISE_KL) & (top1 >= 1 - NOISE_TOP1))
    if likely is None or (curve.horizon is not None and likely >= curve.horizon):
        return None
    rows = [i for i, at in enumerate(curve.layers) if at >= likely]
    widest = max((curve.kl_high[i] - curve.kl[i]) / (NOISE_KL - curve.kl[i]) for i in rows)
    return likely, max(MIN_IMAGES, math.ceil(images * widest**2))


def _finding(
    half: DropCurve, everything: DropCurve, images: int, needed: Sequence[tuple[int, int] | None]
) -> str:
    if images < MIN_IMAGES:
        return f"no information horizon: {images} pictures are too few, {MIN_IMAGES} are needed"
    said = []
    for what, curve in (("half of the visual tokens at random", half), ("all of them", everything)):
        if curve.horizon is not None:
            said.append(f"{what} from layer {curve.horizon} on")
    if said:
        comma = "," if len(said) > 1 else ""
        text = f"dropping {', or '.join(said)}{comma} stays within {NOISE_KL:g} nats of dropping nothing"
    else:
        least = min(half.kl[-1], everything.kl[-1])
        text = f"no information horizon: even before the last layer dropping tokens costs {least:.2g} nats"
        if least < NOISE_KL:
            text = "no information horizon that is sure"
    more = [f"layer {one[0]} with about {one[1]} pictures" for one in needed if one is not None]
    return f"{text}; perhaps {' and '.join(more)}" if more else text

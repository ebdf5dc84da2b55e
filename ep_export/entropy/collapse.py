"""Where the entropy of visual tokens collapses, and how sure that is. NumPy only.

Layer entropies of many pictures enter. What leaves names a layer or says that there is no collapse: a
model without one must not be given a layer by an argmax that always finds something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Collapse", "find_collapse", "fixed_rule_stages"]

RESAMPLES = 2000
"""The 2.5% quantile of so many has a standard error of about 0.3%."""

MIN_CONFIDENCE = 0.95
"""The layer must stay the same in so many resamples: the usual 5% of being fooled."""

MIN_RATIO = 3.0
"""The drop must be so many times the median change of the other layers: a curve that wanders by as much
everywhere has no collapse, however surely its largest step is known."""

MIN_SHARE = 0.02
"""And so much of the entropy before it: with many pictures a drop too small to matter is still certain."""

MIN_IMAGES = 4
"""Fewer pictures cannot give a 95% interval."""


@dataclass(frozen=True)
class Collapse:
    """What was found.

    Attributes:
        layer: K, or None when there is no collapse.
        sharpest: The layer with the largest mean drop, significant or not.
        confidence: Share of resamples of the pictures in which the largest drop is at `sharpest`.
        drop: Mean S_{K-1} - S_K there, in nats.
        drop_low: Lower end of its 95% interval over pictures.
        finding: One sentence with the numbers.
    """

    layer: int | None
    sharpest: int
    confidence: float
    drop: float
    drop_low: float
    finding: str


def find_collapse(entropies: NDArray[np.float64], *, seed: int = 0, unit: str = " nats") -> Collapse:
    """K = argmax over l >= 1 of S_{l-1} - S_l, if a collapse there is.

    All must hold: at least 4 pictures; the drop's 95% bootstrap interval is above 0; the largest drop is at
    the same layer in 95% of resamples; it is 3 times the median absolute change of the other layers; and 2%
    of the entropy before it.

    Args:
        entropies: [images, layers] in nats, finite; or another metric that falls in a collapse.
        seed: Of the resampling.
        unit: What the finding calls its numbers.

    Raises:
        ValueError: Fewer than 2 layers, or no picture.
    """
    images, layers = entropies.shape
    if layers < 2 or images < 1:
        raise ValueError(f"a collapse needs 2 layers and a picture, got {layers} and {images}")
    drops = entropies[:, :-1] - entropies[:, 1:]  # drops[:, l - 1] is the drop into layer l
    mean = drops.mean(axis=0)
    at = int(mean.argmax())
    draws = np.random.default_rng(seed).integers(images, size=(RESAMPLES, images))
    resampled = np.stack([drops[draw].mean(axis=0) for draw in draws])
    confidence = float((resampled.argmax(axis=1) == at).mean())
    low = float(np.quantile(resampled[:, at], 0.025))
    before = float(entropies[:, at].mean())
    others = np.abs(np.delete(mean, at))
    usual = float(np.median(others)) if len(others) else 0.0
    reason = _objection(images, confidence, f"{mean[at]:.3f}{unit}", float(mean[at]), low, before, usual)
    step = f"the largest drop is {mean[at]:.3f}{unit} at layer {at + 1} (interval from {low:.3f})"
    return Collapse(
        layer=None if reason else at + 1,
        sharpest=at + 1,
        confidence=confidence,
        drop=float(mean[at]),
        drop_low=low,
        finding=f"no collapse found: {reason}" if reason else f"{step}, in {confidence:.0%} of resamples",
    )


def fixed_rule_stages(mean_entropy: NDArray[np.float64], *, threshold: float = -1.0) -> tuple[int, ...]:
    """UNComp's rule (arXiv 2410.03090): a stage starts at layer l + 1 where S_{l+1} - S_l < -1.

    Args:
        mean_entropy: [layers] in nats.
        threshold: Change that starts a stage.

    Returns:
        The layers at which a stage starts, ascending.
    """
    return tuple(int(layer) + 1 for layer in np.flatnonzero(np.diff(mean_entropy) < threshold))


def _objection(
    images: int, confidence: float, said: str, drop: float, low: float, before: float, usual: float
) -> str | None:
    """Why the largest drop is no collapse, or None."""
    if images < MIN_IMAGES:
        return f"{images} pictures are too few, {MIN_IMAGES} are needed"
    if drop <= 0:
        return "it falls at no layer"
    if low <= 0:
        return f"the largest drop, {said}, is not above 0 for sure"
    if confidence < MIN_CONFIDENCE:
        return f"the largest drop is at the same layer in {confidence:.0%} of resamples only"
    if drop < MIN_RATIO * usual:
        return f"the largest drop, {said}, does not stand out from the usual change of {usual:.3f}"
    if drop < MIN_SHARE * before:
        return f"the largest drop, {said}, is small against the {before:.2f} before it"
    return None

"""Token scores without an eigendecomposition: the arithmetic of the EntropyPrune body, in float32.

-tr(A ln A) is the trace of a function of A. With s = ||A||_F the spectrum of A / s lies in [0, 1], where a
sum over repeated squares stands in for -x ln x (`entropy_series`). Only operations that ONNX has are used, in
the order the exported graph uses them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.policy import DEGREES, Scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EntropySeries", "approximation_spread", "entropy_series", "series_scores"]

_RATE = 0.64
"""Of the series. A larger one resolves smaller eigenvalues and errs more at large ones. Up to here, at every
degree from 32, tokens of every kind tried move against each other no more than with one weight for all powers
of I - A / 2, a series that takes one product more."""

_UNRESOLVED = 8.0
"""Over the degree: below such an eigenvalue the fit counts errors less, for no weights make them small."""

_FITTED_POINTS = 4096
"""Of [0, 1], at equal distances: eight to the smallest eigenvalue that degree 512 resolves."""


@dataclass(frozen=True)
class EntropySeries:
    """-x ln x on [0, 1] as slope x + curve x^2 + the sum of weight (1 - y^power), y = 1 - rate x.

    Powers are 4, 8, .., degree; see `entropy_series`.
    """

    degree: int
    rate: float
    slope: float
    curve: float
    weights: tuple[float, ...]

    @property
    def squarings(self) -> int:
        """Matrix products that the powers take: the trace of the last one is a sum of squares."""
        return self.degree.bit_length() - 2

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The series at x, in float64."""
        return np.asarray(_terms(x, self.degree) @ [self.slope, self.curve, *self.weights])


@cache
def entropy_series(degree: int) -> EntropySeries:
    """The series, its weights fitted by least squares over [0, 1].

    -x ln x is, but for a multiple of x, the integral of (1 - e^(-tx)) / t^2 over t > 0. In steps of ln 2 in
    ln t that is a sum over t = 2^k with weights ln 2 / 2^k, and the sum is nearly exact: its ripple is below
    1e-5. Each exponential is the square of the one before; so are the powers of y = 1 - rate x, which are
    polynomials. One more squaring halves the smallest eigenvalue that is resolved. The smooth rest is left to
    x and x^2, whose traces cost nothing: tr A, and 1 once A is divided by its Frobenius norm.

    Every term is 0 at 0, so that tokens of different rank compare. The error is largest, at most
    0.36 / degree, near x = 0.5 / degree, and falls off above.

    Args:
        degree: The highest power of y, one of `policy.DEGREES`.

    Raises:
        ValueError: Another degree.
    """
    if degree not in DEGREES:
        raise ValueError(f"degree is {degree}, expected a power of two from {DEGREES[0]} to {DEGREES[-1]}")
    x = (np.arange(_FITTED_POINTS) + 0.5) / _FITTED_POINTS
    importance = (x / (x + _UNRESOLVED / degree)) ** 2
    terms = _terms(x, degree) * importance[:, None]
    slope, curve, *weights = np.linalg.lstsq(terms, -x * np.log(x) * importance, rcond=None)[0].tolist()
    return EntropySeries(degree, _RATE, slope, curve, tuple(weights))


def series_scores(states: torch.Tensor, scorer: Scorer, degree: int) -> torch.Tensor:
    """Score every token in float32 with log2(degree) batched squarings.

    `order2` and `norm` need no series; `degree` is ignored for them. `released` leaves out the clamp of
    eigenvalues at 1e-10, worth 2.3e-9 for each one that is zero. float32 rounding adds about 1e-6 nats, up to
    3e-5 where most eigenvalues are exactly zero: the power 512 takes 1 - 6e-8 that far from 1.

    Args:
        states: [tokens, heads, head_dim], any float type.
        scorer: Which score.
        degree: Degree of the series.

    Returns:
        [tokens] float32. 0 for a zero token; not finite where a token holds a non-finite value.
    """
    x = states.float()
    heads = x.shape[1]
    # squares of very large or small states leave float32: every token is scaled to a maximum of 1 first
    scale = x.abs().amax(dim=(1, 2), keepdim=True)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    x = x / scale
    scale = scale[:, 0, 0]
    if scorer is Scorer.NORM:
        return scale * x.square().sum(dim=(1, 2)).sqrt()
    rows = x - x.mean(dim=1, keepdim=True)
    if scorer is not Scorer.RELEASED:
        squares = rows.square().sum(dim=2, keepdim=True)
        rows = rows / torch.where(squares == 0, torch.ones_like(squares), squares).sqrt()
    gram = rows @ rows.transpose(1, 2) / heads
    purity = gram.square().sum(dim=(1, 2))
    if scorer is Scorer.ORDER2:
        return -torch.where(purity == 0, torch.ones_like(purity), purity).log()
    series = entropy_series(degree)
    norm = purity.sqrt()  # Frobenius: no eigenvalue is larger
    bound = torch.where(norm == 0, torch.ones_like(norm), norm)
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    entropy = norm * (series.curve + _weighted_traces(gram / bound[:, None, None], series))
    if scorer is Scorer.PAPER:
        return entropy + (series.slope - bound.log()) * trace
    # released is not scale invariant: its eigenvalues are scale^2 times those of `gram`
    entropy = entropy + (series.slope - bound.log() - 2.0 * scale.log()) * trace
    return scale * (scale * entropy) / (math.log(heads) if heads > 1 else 1.0)


def approximation_spread(exact: torch.Tensor, approximate: torch.Tensor) -> float:
    """How far the approximation can move two tokens against each other: largest minus smallest error.

    Two tokens whose exact scores differ by more than this keep their order, whatever the common offset: the
    tolerance of `kept_difference` between an exact and an approximate selection.

    Args:
        exact: [tokens] float64.
        approximate: [tokens].
    """
    error = approximate.double() - exact
    error = error[torch.isfinite(error)]
    return float(error.max() - error.min()) if error.numel() else 0.0


def _terms(x: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """x, x^2, and 1 - y^4, 1 - y^8, .., 1 - y^degree: [.., 1 + log2(degree)]."""
    power = (1.0 - _RATE * x) ** 2
    terms = [x, x**2]
    for _ in range(1, degree.bit_length() - 1):
        power = power**2
        terms.append(1.0 - power)
    return np.stack(terms, axis=-1)


def _weighted_traces(unit: torch.Tensor, series: EntropySeries) -> torch.Tensor:
    """Sum of weight tr(I - Y^power), Y = I - rate A: [tokens]."""
    heads = unit.shape[1]
    power = torch.eye(heads, dtype=unit.dtype, device=unit.device) - series.rate * unit
    power = power @ power
    total = torch.zeros_like(unit[:, 0, 0])
    for weight in series.weights[:-1]:
        power = power @ power
        # every 1 - x is exact where x is near 1; heads minus a sum would not be
        total = total + weight * (1.0 - power.diagonal(dim1=1, dim2=2)).sum(dim=1)
    return total + series.weights[-1] * (heads - power.square().sum(dim=(1, 2)))

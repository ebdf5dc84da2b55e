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

_RATE = 0.5
"""Of the series. A larger one resolves smaller eigenvalues and errs more at large ones; 0.42 to 0.66 at
degree 512 beat the Chebyshev series of degree 32 on every kind of token tried."""

_FITTED_POINTS = 4096
"""Of [0, 1], at equal distances: eight to the smallest eigenvalue that degree 512 resolves."""


@dataclass(frozen=True)
class EntropySeries:
    """-x ln x on [0, 1] as x (constant + slope x + weight (first y^2 + y^4 + y^8 + .. + y^degree)).

    y = 1 - rate x; see `entropy_series`.
    """

    degree: int
    rate: float
    constant: float
    slope: float
    first: float
    weight: float

    @property
    def squarings(self) -> int:
        """Matrix products that the powers take."""
        return self.degree.bit_length() - 1

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The series at x, in float64."""
        weights = [self.constant, self.slope, self.weight * self.first, self.weight]
        return np.asarray(_terms(x, self.degree) @ weights)


@cache
def entropy_series(degree: int) -> EntropySeries:
    """The series, its four free numbers fitted by least squares over [0, 1].

    -ln x is the integral of (e^(-tx) - e^(-t)) / t over t > 0. In steps of ln 2 in ln t that is ln 2 times
    a sum over t = 2^k, and the sum is nearly exact: its ripple is below 1e-5. Each exponential is the
    square of the one before; so are the powers of y = 1 - x/2, which are polynomials. Hence one weight
    serves all powers (the fit finds 0.6935 at degree 512; ln 2 is 0.6931), and one more squaring halves the
    smallest eigenvalue that is resolved. The smooth rest is left to the constant, the slope and a weight of
    its own for y^2.

    The factor x makes eigenvalue 0 exact, so that tokens of different rank compare. The error is largest,
    at most 0.4 / degree, near x = 0.6 / degree, and falls off exponentially above.

    Args:
        degree: The highest power of y, one of `policy.DEGREES`.

    Raises:
        ValueError: Another degree.
    """
    if degree not in DEGREES:
        raise ValueError(f"degree is {degree}, expected a power of two from {DEGREES[0]} to {DEGREES[-1]}")
    x = (np.arange(_FITTED_POINTS) + 0.5) / _FITTED_POINTS
    constant, slope, first, weight = np.linalg.lstsq(_terms(x, degree), -x * np.log(x), rcond=None)[
        0
    ].tolist()
    return EntropySeries(degree, _RATE, constant, slope, first / weight, weight)


def series_scores(states: torch.Tensor, scorer: Scorer, degree: int) -> torch.Tensor:
    """Score every token in float32 with log2(degree) batched squarings.

    `order2` and `norm` need no series; `degree` is ignored for them. `released` leaves out the clamp of
    eigenvalues at 1e-10, worth 2.3e-9 for each one that is zero.

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
    # Frobenius norm: no eigenvalue is larger
    bound = torch.where(purity == 0, torch.ones_like(purity), purity).sqrt()
    if scorer is Scorer.ORDER2:
        return -2.0 * bound.log()
    series = entropy_series(degree)
    inner = series.weight * (gram * _powers(gram / bound[:, None, None], series)).sum(dim=(1, 2))
    inner = inner + series.slope * purity / bound
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    if scorer is Scorer.PAPER:
        return (series.constant - bound.log()) * trace + inner
    # released is not scale invariant: its eigenvalues are scale^2 times those of `gram`
    entropy = (series.constant - bound.log() - 2.0 * scale.log()) * trace + inner
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
    """x, x^2, x y^2, and x (y^4 + y^8 + .. + y^degree): [.., 4]."""
    first = power = (1.0 - _RATE * x) ** 2
    rest = np.zeros_like(x)
    for _ in range(2, degree.bit_length()):
        power = power**2
        rest = rest + power
    return np.stack([x, x**2, x * first, x * rest], axis=-1)


def _powers(unit: torch.Tensor, series: EntropySeries) -> torch.Tensor:
    """Sum first Y^2 + Y^4 + .. + Y^degree, Y = I - rate A: [tokens, heads, heads]."""
    power = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device) - series.rate * unit
    power = power @ power
    total = series.first * power
    for _ in range(1, series.squarings):
        power = power @ power
        total = total + power
    return total

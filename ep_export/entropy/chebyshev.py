"""Token scores without an eigendecomposition: the arithmetic of the EntropyPrune body, in float32.

-tr(A ln A) is the trace of a function of A. With s = ||A||_F the spectrum of A / s lies in [0, 1], where
-x ln x is a Chebyshev series; the traces of its terms come from few matrix products (`trace_plan`). Only
operations that ONNX has are used, in the order the exported graph uses them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.policy import Scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TracePlan", "approximation_spread", "chebyshev_coefficients", "chebyshev_scores", "trace_plan"]


@dataclass(frozen=True)
class TracePlan:
    """How the series is evaluated; see `trace_plan`.

    Attributes:
        small: p: T_1..T_p are formed one by one.
        big: q: T_p, T_2p, .., T_qp.
        weights: [p, q + 1] float64 on <T_a, B_b>, a = 1..p, B = (I, T_p, .., T_qp).
        constant: Weight on the number of heads, tr I.
    """

    small: int
    big: int
    weights: NDArray[np.float64]
    constant: float


def chebyshev_coefficients(degree: int) -> NDArray[np.float64]:
    """Coefficients c_0..c_degree of -x ln x on [0, 1], so that f(x) is about sum_j c_j T_j(2x - 1).

    Interpolation at the Chebyshev points of the first kind. They leave an error near 0, where the function's
    slope is infinite, which is nearly the same for every token: it moves all scores, hardly their order.

    Args:
        degree: n, at least 2.

    Returns:
        [degree + 1] float64.
    """
    if degree < 2:
        raise ValueError(f"degree is {degree}, expected at least 2")
    from numpy.polynomial.chebyshev import Chebyshev

    def entropy(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(x > 0, -x * np.log(np.maximum(x, np.finfo(np.float64).tiny)), 0.0)

    series = Chebyshev.interpolate(entropy, degree, domain=[0, 1])
    return np.asarray(series.coef, dtype=np.float64)


def chebyshev_scores(states: torch.Tensor, scorer: Scorer, degree: int) -> torch.Tensor:
    """Score every token in float32 with about 2 sqrt(degree) batched matrix products.

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
    bound = gram.square().sum(dim=(1, 2)).sqrt()  # Frobenius norm: no eigenvalue is larger
    safe = torch.where(bound == 0, torch.ones_like(bound), bound)
    if scorer is Scorer.ORDER2:
        return -2.0 * safe.log()
    unit = gram / safe[:, None, None]
    series = _entropy_trace(unit, degree)
    trace = unit.diagonal(dim1=1, dim2=2).sum(dim=1)
    if scorer is Scorer.PAPER:
        return bound * (series - safe.log() * trace)
    # released is not scale invariant: the eigenvalues are scale^2 bound times those of `unit`
    entropy = bound * (series - (safe.log() + 2.0 * scale.log()) * trace)
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


def trace_plan(degree: int) -> TracePlan:
    """Which matrices and inner products give sum_j c_j tr T_j(M), and with which weights.

    tr T_{a+b} = 2 <T_a, T_b> - tr T_{|a-b|} (all T commute and are symmetric). With the small steps T_1..T_p
    and the big steps T_p, T_2p, .., T_qp every order up to (q + 1) p is within reach, so that about
    2 sqrt(degree) matrix products serve where halving the degree needs degree / 2; the inner products are one
    batched matrix product. Unrolling the recurrence makes the sum linear in them.

    Args:
        degree: As for `chebyshev_coefficients`.
    """
    coefficients = chebyshev_coefficients(degree)
    small = round(math.sqrt(degree))
    big = -(-degree // small) - 1
    # terms[j]: tr T_j as weights on <T_a, B_b>, B = (I, T_p, .., T_qp), and on tr I = heads
    terms = [(np.zeros((small, big + 1)), 1.0)]
    for order in range(1, degree + 1):
        b = (order - 1) // small
        a = order - b * small
        weights = np.zeros((small, big + 1))
        constant = 0.0
        if b:
            before, offset = terms[abs(b * small - a)]
            weights, constant = -before, -offset
        weights[a - 1, b] += 2.0 if b else 1.0
        terms.append((weights, constant))
    total = sum(c * weights for c, (weights, _) in zip(coefficients, terms, strict=True))
    constant = float(sum(c * offset for c, (_, offset) in zip(coefficients, terms, strict=True)))
    return TracePlan(small, big, np.asarray(total), constant)


def _entropy_trace(unit: torch.Tensor, degree: int) -> torch.Tensor:
    """sum_j c_j tr T_j(2 A - I), the trace of -A ln A.

    Args:
        unit: [tokens, heads, heads] symmetric, spectrum in [0, 1].
        degree: Degree of the series.

    Returns:
        [tokens].
    """
    tokens, heads, _ = unit.shape
    plan = trace_plan(degree)
    eye = torch.eye(heads, dtype=unit.dtype, device=unit.device)
    first = 2.0 * unit - eye
    small = [eye.expand_as(unit), first]
    for _ in range(2, plan.small + 1):
        small.append(2.0 * (first @ small[-1]) - small[-2])
    step = small[plan.small]
    big = [small[0], step]
    for _ in range(2, plan.big + 1):
        big.append(2.0 * (step @ big[-1]) - big[-2])
    left = torch.stack(small[1:], dim=1).reshape(tokens, plan.small, -1)
    right = torch.stack(big[: plan.big + 1], dim=1).reshape(tokens, plan.big + 1, -1)
    inner = left @ right.transpose(1, 2)
    weights = torch.from_numpy(plan.weights).to(unit)
    return (inner * weights).sum(dim=(1, 2)) + plan.constant * heads

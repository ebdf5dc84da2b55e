from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import entr

from ep_export.entropy import (
    approximation_spread,
    chebyshev_coefficients,
    chebyshev_scores,
    select_tokens,
    token_scores,
    trace_plan,
)
from ep_export.policy import Scorer, Select

DEGREES = (8, 16, 32, 64)


def flat(tokens: int, heads: int, head_dim: int) -> torch.Tensor:
    """Independent heads: every direction about equally strong."""
    return torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(heads))


def low_rank(tokens: int, heads: int, head_dim: int) -> torch.Tensor:
    """Heads that share three directions and a little noise: most eigenvalues near 0, the hard case."""
    generator = torch.Generator().manual_seed(heads)
    shared = torch.randn(tokens, heads, 3, generator=generator) @ torch.randn(
        tokens, 3, head_dim, generator=generator
    )
    return shared + 0.05 * torch.randn(tokens, heads, head_dim, generator=generator)


def overlap(exact: torch.Tensor, approximate: torch.Tensor, share: float = 0.25) -> float:
    k, index = round(share * len(exact)), torch.arange(len(exact))
    kept = select_tokens(exact, k, select=Select.HIGHEST, visual_index=index)
    other = select_tokens(approximate, k, select=Select.HIGHEST, visual_index=index)
    return len(np.intersect1d(kept, other)) / k


@pytest.mark.parametrize("degree", DEGREES)
def test_series_approximates_entropy_ever_better(degree: int) -> None:
    x = np.linspace(0, 1, 20001)
    error = np.abs(np.polynomial.chebyshev.chebval(2 * x - 1, chebyshev_coefficients(degree)) - entr(x)).max()
    # the slope at 0 is infinite, so the error falls as degree^-2 only: measured 0.92 / (degree + 1)^2, at 0
    assert 0.9 < error * (degree + 1) ** 2 < 0.94


@pytest.mark.parametrize("heads", [7, 28, 32])
@pytest.mark.parametrize("kind", [flat, low_rank])
def test_error_against_exact_falls_with_degree(heads: int, kind) -> None:
    states = kind(96, heads, 128)
    exact = token_scores(states, Scorer.PAPER)
    approximate = [chebyshev_scores(states, Scorer.PAPER, degree).double() for degree in DEGREES]
    spreads = [approximation_spread(exact, scores) for scores in approximate]
    worst = [(scores - exact).abs().max().item() for scores in approximate]
    for finer, coarser in zip(spreads[1:], spreads, strict=False):
        assert finer < coarser
    for finer, coarser in zip(worst[1:], worst, strict=False):
        assert finer < 0.4 * coarser
    # measured at degree 16: 0.0015 nats (flat) and 0.055 (low rank), mostly an offset that all tokens share
    assert worst[1] < (0.003 if kind is flat else 0.08)


@pytest.mark.parametrize("scorer", [Scorer.PAPER, Scorer.RELEASED])
def test_quarter_of_576_tokens_is_kept_nearly_exactly_at_degree_16_and_exactly_at_32(scorer: Scorer) -> None:
    states = flat(576, 32, 128)
    exact = token_scores(states, scorer)
    # independent heads are the closest race: all scores lie within 0.04 nats
    assert overlap(exact, chebyshev_scores(states, scorer, 16)) > 0.99
    assert overlap(exact, chebyshev_scores(states, scorer, 32)) == 1.0


@pytest.mark.parametrize("scorer", [Scorer.ORDER2, Scorer.NORM])
def test_scores_without_a_series_are_exact_to_float32(scorer: Scorer) -> None:
    for states in (flat(100, 7, 64), low_rank(100, 28, 64)):
        torch.testing.assert_close(
            chebyshev_scores(states, scorer, 16).double(), token_scores(states, scorer), rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e18])
@pytest.mark.parametrize("scorer", [Scorer.PAPER, Scorer.ORDER2])
def test_scale_of_a_token_does_not_matter_to_its_entropy(scorer: Scorer, factor: float) -> None:
    states = flat(20, 7, 32)
    torch.testing.assert_close(
        chebyshev_scores(states * factor, scorer, 16),
        chebyshev_scores(states, scorer, 16),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_released_score_follows_the_scale_as_the_exact_one(factor: float) -> None:
    states = factor * flat(50, 8, 32)
    exact = token_scores(states, Scorer.RELEASED)
    torch.testing.assert_close(
        # the series is off by about 5e-4 of a unit trace, the trace is about 32 factor^2; the floor of the
        # eigenvalues adds 2.3e-9
        chebyshev_scores(states, Scorer.RELEASED, 32).double(),
        exact,
        rtol=1e-3,
        atol=0.02 * factor**2 + 5e-9,
    )


@pytest.mark.parametrize("scorer", list(Scorer))
def test_zero_tokens_and_one_head_score_a_finite_number(scorer: Scorer) -> None:
    assert chebyshev_scores(torch.zeros(2, 6, 16), scorer, 16).tolist() == [0.0, 0.0]
    assert torch.isfinite(chebyshev_scores(flat(3, 1, 16), scorer, 16)).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("scorer", list(Scorer))
def test_non_finite_token_has_a_non_finite_score_alone(scorer: Scorer, bad: float) -> None:
    states = flat(4, 6, 16)
    states[1, 0, 0] = bad
    assert torch.isfinite(chebyshev_scores(states, scorer, 16)).tolist() == [True, False, True, True]


@pytest.mark.parametrize("degree", [-2, 0, 1])
def test_a_degree_without_curvature_is_refused(degree: int) -> None:
    with pytest.raises(ValueError, match=f"degree is {degree}"):
        chebyshev_coefficients(degree)


def test_tokens_further_apart_than_the_spread_keep_their_order() -> None:
    states = low_rank(300, 8, 32)
    exact, approximate = (
        token_scores(states, Scorer.PAPER),
        chebyshev_scores(states, Scorer.PAPER, 16).double(),
    )
    spread = approximation_spread(exact, approximate)
    far = (exact[:, None] - exact[None, :]) > spread
    assert far.any()
    assert (approximate[:, None] >= approximate[None, :])[far].all()


@pytest.mark.parametrize("degree", [2, 3, 4, 7, 10, 15, 16, 24, 32, 64])
def test_the_trace_plan_is_the_series_it_stands_for(degree):
    """On eigenvalues: the plan's inner products against NumPy's own evaluation of the series."""
    eigenvalues = np.random.default_rng(degree).uniform(0, 1, size=7)
    plan = trace_plan(degree)
    order = np.arange(max(plan.small, plan.small * plan.big) + 1)
    terms = np.cos(order[:, None] * np.arccos(2 * eigenvalues - 1))  # T_j of the diagonal matrix
    small = terms[1 : plan.small + 1]
    big = np.stack([terms[0], *(terms[b * plan.small] for b in range(1, plan.big + 1))])
    got = (plan.weights * (small @ big.T)).sum() + plan.constant * len(eigenvalues)
    expected = np.polynomial.chebyshev.chebval(2 * eigenvalues - 1, chebyshev_coefficients(degree)).sum()
    assert got == pytest.approx(expected, abs=1e-12)


def test_big_steps_need_fewer_products_than_half_the_degree():
    for degree in (16, 32, 64):
        plan = trace_plan(degree)
        assert (plan.small - 1) + (plan.big - 1) < degree // 2 - 1
        assert plan.small * (plan.big + 1) >= degree

"""The scores without eigenvalues against exact ones, and their series against -x ln x and Chebyshev's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebinterpolate, chebval
from scipy.special import entr

from ep_export.entropy import approximation_spread, entropy_series, series_scores, token_scores
from ep_export.policy import DEFAULT_DEGREE, DEGREES, Scorer

FINE = (64, 128, 256, 512)


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


def mixed_rank(tokens: int, heads: int, head_dim: int) -> torch.Tensor:
    """Tokens of rank 1 to 12: what an error at eigenvalue 0 would tell apart."""
    generator = torch.Generator().manual_seed(heads)
    left = torch.randn(tokens, heads, 12, generator=generator)
    right = torch.randn(tokens, 12, head_dim, generator=generator)
    rank = 1 + torch.arange(tokens) % 12
    return (left * (torch.arange(12) < rank[:, None])[:, None]) @ right


def overlap(exact: torch.Tensor, approximate: torch.Tensor, share: float = 0.25) -> float:
    k = round(share * len(exact))
    best = [scores.argsort(descending=True, stable=True)[:k] for scores in (exact, approximate)]
    return len(np.intersect1d(*best)) / k


def chebyshev_scores(states: torch.Tensor, degree: int) -> torch.Tensor:
    """The paper's score with -x ln x interpolated at Chebyshev points, on float64 eigenvalues."""
    rows = states.double() - states.double().mean(dim=1, keepdim=True)
    rows = rows / rows.norm(dim=2, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(rows @ rows.mT / rows.shape[1]).numpy()
    norm = np.sqrt((eigenvalues**2).sum(axis=1))
    coefficients = chebinterpolate(lambda t: entr((t + 1) / 2), degree)
    series = chebval(2 * eigenvalues / norm[:, None] - 1, coefficients).sum(axis=1)
    return torch.from_numpy(norm * series - np.log(norm) * eigenvalues.sum(axis=1))


@pytest.mark.parametrize("degree", DEGREES)
def test_series_approximates_entropy_ever_better(degree: int) -> None:
    x = np.r_[0, np.geomspace(1e-7, 1, 20001)]
    error = np.abs(entropy_series(degree)(x) - entr(x))
    assert error[0] == 0
    # the slope at 0 is infinite, so the error falls as 1 / degree only: measured 0.15 to 0.4
    assert 0.15 < error.max() * degree < 0.42


def test_the_error_is_confined_to_small_eigenvalues() -> None:
    x = np.linspace(20 / DEFAULT_DEGREE, 1, 2001)
    # measured 6.7e-6; what all large eigenvalues add is what flat tokens are told apart by
    assert np.abs(entropy_series(DEFAULT_DEGREE)(x) - entr(x)).max() < 1e-5


def test_weights_are_nearly_those_of_the_integral_over_scales() -> None:
    # ln 2 / (rate power) in steps of ln 2; the first also stands for y^2, the last for the powers left out
    series = entropy_series(512)
    theory = math.log(2) / (series.rate * 2.0 ** np.arange(2, 2 + len(series.weights)))
    np.testing.assert_allclose(series.weights[1:-2], theory[1:-2], rtol=0.15)


@pytest.mark.parametrize("degree", [-2, 0, 1, 24, 2048])
def test_a_degree_that_is_not_offered_is_refused(degree: int) -> None:
    with pytest.raises(ValueError, match=f"degree is {degree}"):
        entropy_series(degree)


@pytest.mark.parametrize("heads", [7, 28, 32])
@pytest.mark.parametrize("kind", [flat, low_rank, mixed_rank])
def test_error_against_exact_falls_with_degree(heads: int, kind) -> None:
    states = kind(96, heads, 128)
    exact = token_scores(states, Scorer.PAPER)
    approximate = [series_scores(states, Scorer.PAPER, degree).double() for degree in FINE]
    worst = [(scores - exact).abs().max().item() for scores in approximate]
    for finer, coarser in zip(worst[1:], worst, strict=False):
        # measured up to 0.79; eigenvalues that are exactly zero leave float32 noise, measured up to 2.9e-5
        assert finer < max(0.85 * coarser, 4e-5)
    assert worst[-1] < (1e-4 if kind is flat else 0.02)


@pytest.mark.parametrize("heads", [7, 28, 32])
@pytest.mark.parametrize("kind", [flat, low_rank, mixed_rank])
def test_tokens_move_at_most_half_as_far_as_with_chebyshev_of_degree_16(heads: int, kind) -> None:
    """Seven products; degree 32, as good where the rank is low, takes nine and thirty inner products."""
    states = kind(96, heads, 128)
    exact = token_scores(states, Scorer.PAPER)
    ours = approximation_spread(exact, series_scores(states, Scorer.PAPER, DEFAULT_DEGREE))
    theirs = [approximation_spread(exact, chebyshev_scores(states, degree)) for degree in (8, 16)]
    assert theirs[0] > theirs[1] > 2 * ours


@pytest.mark.parametrize("scorer", [Scorer.PAPER, Scorer.RELEASED])
def test_quarter_of_576_tokens_is_kept_exactly(scorer: Scorer) -> None:
    states = flat(576, 32, 128)
    exact = token_scores(states, scorer)
    # independent heads are the closest race: all scores lie within 0.04 nats
    assert overlap(exact, series_scores(states, scorer, 128)) > 0.99
    assert overlap(exact, series_scores(states, scorer, DEFAULT_DEGREE)) == 1.0


@pytest.mark.parametrize("scorer", [Scorer.ORDER2, Scorer.NORM])
def test_scores_without_a_series_are_exact_to_float32(scorer: Scorer) -> None:
    for states in (flat(100, 7, 64), low_rank(100, 28, 64)):
        torch.testing.assert_close(
            series_scores(states, scorer, DEFAULT_DEGREE).double(),
            token_scores(states, scorer),
            rtol=2e-6,
            atol=2e-6,
        )


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e18])
@pytest.mark.parametrize("scorer", [Scorer.PAPER, Scorer.ORDER2])
def test_scale_of_a_token_does_not_matter_to_its_entropy(scorer: Scorer, factor: float) -> None:
    states = flat(20, 7, 32)
    torch.testing.assert_close(
        series_scores(states * factor, scorer, DEFAULT_DEGREE),
        series_scores(states, scorer, DEFAULT_DEGREE),
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
        series_scores(states, Scorer.RELEASED, DEFAULT_DEGREE).double(),
        exact,
        rtol=1e-3,
        atol=0.02 * factor**2 + 5e-9,
    )


@pytest.mark.parametrize("scorer", list(Scorer))
def test_zero_tokens_and_one_head_score_a_finite_number(scorer: Scorer) -> None:
    assert series_scores(torch.zeros(2, 6, 16), scorer, DEFAULT_DEGREE).tolist() == [0.0, 0.0]
    assert torch.isfinite(series_scores(flat(3, 1, 16), scorer, DEFAULT_DEGREE)).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("scorer", list(Scorer))
def test_non_finite_token_has_a_non_finite_score_alone(scorer: Scorer, bad: float) -> None:
    states = flat(4, 6, 16)
    states[1, 0, 0] = bad
    assert torch.isfinite(series_scores(states, scorer, DEFAULT_DEGREE)).tolist() == [True, False, True, True]


def test_tokens_further_apart_than_the_spread_keep_their_order() -> None:
    states = low_rank(300, 8, 32)
    exact, approximate = (
        token_scores(states, Scorer.PAPER),
        series_scores(states, Scorer.PAPER, 64).double(),
    )
    spread = approximation_spread(exact, approximate)
    far = (exact[:, None] - exact[None, :]) > spread
    assert far.any()
    assert (approximate[:, None] >= approximate[None, :])[far].all()

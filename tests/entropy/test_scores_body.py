"""The scorers in ONNX operators against exact scores in float64 and their float32 form in PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from ep_export.entropy import series_scores, token_scores
from ep_export.entropy.scores_body import scores_model
from ep_export.policy import DEFAULT_DEGREE, DEGREES, Scorer

HEADS, HEAD_DIM = 6, 16
ENTROPIES = (Scorer.PAPER, Scorer.RELEASED, Scorer.ORDER2)


def tokens(count: int, heads: int = HEADS, head_dim: int = HEAD_DIM, seed: int = 0) -> np.ndarray:
    """Heads of different size and direction, so that entropies spread."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 3, (count, heads, 1))
    common = rng.standard_normal((count, 1, head_dim)) * rng.uniform(0, 4, (count, 1, 1))
    return (rng.standard_normal((count, heads, head_dim)) * scale + common).astype(np.float32)


def body_scores(
    states: np.ndarray, scorer: Scorer, degree: int = DEFAULT_DEGREE, opset: int = 20
) -> np.ndarray:
    proto = ir.to_proto(scores_model(*states.shape[1:], scorer, degree, opset=opset))
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"states": states})[0]


def exact_scores(states: np.ndarray, scorer: Scorer) -> np.ndarray:
    return token_scores(torch.from_numpy(states), scorer).numpy()


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("scorer", list(Scorer))
def test_scores_follow_the_exact_ones(scorer: Scorer, opset: int) -> None:
    states = tokens(200)
    states[3], states[4] = 0, states[4, :1]  # nothing at all, and all heads equal
    got = body_scores(states, scorer, opset=opset)
    series = series_scores(torch.from_numpy(states), scorer, DEFAULT_DEGREE).numpy()
    exact = exact_scores(states, scorer)
    np.testing.assert_allclose(got, series, rtol=2e-5, atol=2e-5)  # float32 rounding
    # What the series leaves out: up to 0.002 for entropies; nothing for the other scores.
    truncation = (
        2e-3 * np.maximum(1, np.abs(exact).max()) if scorer in (Scorer.PAPER, Scorer.RELEASED) else 1e-4
    )
    np.testing.assert_allclose(got, exact, atol=truncation, rtol=1e-5)
    assert np.corrcoef(np.argsort(np.argsort(got)), np.argsort(np.argsort(exact)))[0, 1] > 0.99


@pytest.mark.parametrize("degree", DEGREES)
def test_every_degree_computes_its_series(degree: int) -> None:
    states = tokens(40, heads=7, head_dim=24)
    got = body_scores(states, Scorer.PAPER, degree)
    series = series_scores(torch.from_numpy(states), Scorer.PAPER, degree).numpy()
    np.testing.assert_allclose(got, series, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scorer", ENTROPIES)
def test_one_head_has_no_entropy(scorer: Scorer) -> None:
    np.testing.assert_array_equal(body_scores(tokens(5, heads=1), scorer, 16), np.zeros(5))


def test_576_independent_tokens_are_told_apart_as_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(576, 32, 128, generator=generator).numpy()
    got, exact = body_scores(states, Scorer.PAPER), exact_scores(states, Scorer.PAPER)
    assert np.abs(got - exact).max() < 1e-5  # measured 4e-6
    assert set(np.argsort(-got)[:144]) == set(np.argsort(-exact)[:144])


@pytest.mark.parametrize("factor", [1e-10, 1e-4, 1e4, 1e10])
@pytest.mark.parametrize("scorer", [Scorer.PAPER, Scorer.ORDER2])
def test_scale_of_a_token_does_not_matter_to_its_entropy(scorer: Scorer, factor: float) -> None:
    states = tokens(20)
    scaled = (states * factor).astype(np.float32)
    np.testing.assert_allclose(body_scores(scaled, scorer), body_scores(states, scorer), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("scorer", list(Scorer))
def test_non_finite_token_has_a_non_finite_score_alone(scorer: Scorer, bad: float) -> None:
    states = tokens(4)
    states[1, 0, 0] = bad
    assert np.isfinite(body_scores(states, scorer)).tolist() == [True, False, True, True]


def test_no_power_is_formed_that_its_trace_does_not_need() -> None:
    nodes = scores_model(32, 128, Scorer.PAPER, 512).graph
    squarings = [node for node in nodes if node.op_type == "MatMul" and node.inputs[0] is node.inputs[1]]
    assert len(squarings) == 8  # Y^256; the trace of Y^512 is a sum of its squares

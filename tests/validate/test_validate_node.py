"""The node alone, cut out of a bundle, and the bound its scores are held to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ep_export.entropy import entropy_series, select_tokens, series_scores, token_scores
from ep_export.errors import UserError
from ep_export.export import strip_body
from ep_export.policy import Scorer, Select
from ep_export.validate.node_check import NodeRunner, run_scores
from ep_export.validate.tolerance import score_bound


def tokens(count, heads, width, seed=0):
    """Low-rank tokens of very different sizes: small eigenvalues are where the series is worst."""
    random = np.random.default_rng(seed)
    low_rank = random.standard_normal((count, heads, 2)) @ random.standard_normal((count, 2, width))
    size = 10.0 ** random.uniform(-2, 2, (count, 1, 1))
    return (size * (low_rank + 0.1 * random.standard_normal((count, heads, width)))).astype(np.float32)


def test_the_node_keeps_what_exact_scores_keep(tiny_bundle):
    node = NodeRunner(tiny_bundle.file("decoder_head.onnx"))
    states = tokens(24, 4, 16)
    visual = np.concatenate([np.arange(5, 15), np.arange(20, 34)])
    scores = token_scores(torch.from_numpy(states), Scorer.PAPER).numpy()
    expected = select_tokens(scores, 7, select=Select.HIGHEST, visual_index=visual)
    kept = node.kept_index(states, visual, 40, 7)
    np.testing.assert_array_equal(kept[np.isin(kept, visual)], expected)
    np.testing.assert_array_equal(kept[~np.isin(kept, visual)], np.setdiff1d(np.arange(40), visual))


def test_a_head_without_the_nodes_body_is_refused(tiny_bundle, tmp_path):
    strip_body(tiny_bundle.file("decoder_head.onnx"), tmp_path / "stripped.onnx")
    with pytest.raises(UserError, match="no body"):
        NodeRunner(tmp_path / "stripped.onnx")


def test_a_file_without_the_node_is_refused(tiny_bundle):
    with pytest.raises(UserError, match="holds 0 EntropyPrune nodes"):
        NodeRunner(tiny_bundle.file("decoder_tail.onnx"))


@pytest.mark.parametrize("scorer", Scorer)
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (7, 40), (28, 128)])
@pytest.mark.parametrize("degree", [8, 16, 32])
def test_scores_stay_within_the_bound_and_near_it(scorer, heads, width, degree):
    states = tokens(64, heads, width, seed=degree)
    exact = token_scores(torch.from_numpy(states), scorer)
    bound, reason = score_bound(scorer, states, entropy_series(degree))
    error = float((series_scores(torch.from_numpy(states), scorer, degree).double() - exact).abs().max())
    assert error < bound
    if scorer in {Scorer.PAPER, Scorer.RELEASED}:
        assert error > bound / 100  # a bound nothing comes near to would catch nothing
        assert f"degree {degree}" in reason


@pytest.mark.parametrize("scorer", Scorer)
def test_the_exported_scores_stay_within_the_bound(scorer):
    states = tokens(32, 6, 16)
    exact = token_scores(torch.from_numpy(states), scorer).numpy()
    bound, _ = score_bound(scorer, states, entropy_series(16))
    assert np.abs(run_scores(states, scorer, 16) - exact).max() < bound


def test_a_wrong_scorer_breaks_the_bound():
    states = tokens(32, 6, 16)
    exact = token_scores(torch.from_numpy(states), Scorer.PAPER).numpy()
    bound, _ = score_bound(Scorer.PAPER, states, entropy_series(16))
    assert np.abs(run_scores(states, Scorer.ORDER2, 16) - exact).max() > bound

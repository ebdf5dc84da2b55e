"""TopK: the selection rule, its near-ties, and EntropyPrune against both."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
import torch
from prune_graphs import DIMS, kept_positions, prompt, run, session, spread_states

from ep_export.choosers import KeptDifference, choose, difference
from ep_export.choosers.top_k import (
    DOMAIN,
    OP_TYPE,
    kept_difference,
    picture_of,
    prune_function,
    select_tokens,
)
from ep_export.entropy import approximation_spread, token_scores
from ep_export.policy import Budget, Scorer, Select, Source, TopK


def kept(scores: list[float], k: int, select: Select, index: list[int] | None = None, budget=Budget.JOINT):
    index = index or list(range(len(scores)))
    result = select_tokens(np.array(scores), k, select=select, visual_index=np.array(index), budget=budget)
    same = select_tokens(
        torch.tensor(scores, dtype=torch.float64),
        k,
        select=select,
        visual_index=torch.tensor(index),
        budget=budget,
    )
    assert isinstance(same, torch.Tensor)
    assert same.tolist() == result.tolist()
    return result.tolist()


def test_highest_and_lowest_are_kept_in_prompt_order() -> None:
    scores, index = [3.0, 1.0, 2.0, 5.0, 4.0], [10, 11, 12, 13, 14]
    assert kept(scores, 2, Select.HIGHEST, index) == [13, 14]
    assert kept(scores, 2, Select.LOWEST, index) == [11, 12]


@pytest.mark.parametrize("select", list(Select))
def test_ties_go_to_the_lower_index(select: Select) -> None:
    assert kept([1.0, 1.0, 1.0, 1.0], 2, select) == [0, 1]
    assert kept([0.0, -0.0, 0.0], 1, select) == [0]


@pytest.mark.parametrize("select", list(Select))
def test_scores_that_are_not_finite_rank_last_whichever_end_is_kept(select: Select) -> None:
    scores = [float("nan"), 1.0, float("inf"), 2.0, float("-inf"), 3.0]
    assert kept(scores, 3, select) == [1, 3, 5]
    assert kept(scores, 4, select) == [0, 1, 3, 5]


@pytest.mark.parametrize("select", list(Select))
def test_keeping_all_or_none(select: Select) -> None:
    assert kept([2.0, 1.0], 2, select, [4, 9]) == [4, 9]
    assert kept([2.0, 1.0], 0, select, [4, 9]) == []


def test_per_picture_budget_gives_each_picture_its_share() -> None:
    scores = [9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]  # jointly the first picture would win everything
    index = [1, 2, 3, 4, 7, 8, 9, 10]
    assert kept(scores, 4, Select.HIGHEST, index) == [1, 2, 3, 4]
    assert kept(scores, 4, Select.HIGHEST, index, Budget.PER_PICTURE) == [1, 2, 9, 10]
    assert kept(scores, 4, Select.LOWEST, index, Budget.PER_PICTURE) == [3, 4, 7, 8]


def test_per_picture_budget_is_proportional_and_ties_go_to_the_earlier_picture() -> None:
    scores = [float(i) for i in range(9)]
    index = [0, 1, 2, 3, 4, 5, 10, 11, 12]  # six tokens and three
    assert kept(scores, 3, Select.HIGHEST, index, Budget.PER_PICTURE) == [4, 5, 12]
    # one picture of one token each: both have the share 1/2
    assert kept([1.0, 1.0], 1, Select.HIGHEST, [3, 7], Budget.PER_PICTURE) == [3]


@pytest.mark.parametrize(("k", "positions"), [(-1, 3), (4, 3), (1, 2)])
def test_impossible_numbers_are_refused(k: int, positions: int) -> None:
    with pytest.raises(ValueError, match="cannot keep"):
        select_tokens(np.zeros(3), k, select=Select.HIGHEST, visual_index=np.arange(positions))


class TestKeptDifference:
    scores = np.array([5.0, 4.0, 3.0000010, 3.0, 1.0])
    index = np.array([2, 3, 4, 5, 6])

    def classify(self, a: list[int], b: list[int], **rest) -> KeptDifference:
        return kept_difference(self.scores, np.array(a), np.array(b), len(a), visual_index=self.index, **rest)

    def test_same_sets_are_equal_in_any_order(self) -> None:
        assert self.classify([2, 3, 4], [4, 2, 3]) is KeptDifference.EQUAL

    def test_swap_across_a_gap_below_the_tolerance_is_a_near_tie(self) -> None:
        assert self.classify([2, 3, 4], [2, 3, 5]) is KeptDifference.NEAR_TIE

    def test_the_same_swap_is_different_under_a_smaller_tolerance(self) -> None:
        assert self.classify([2, 3, 4], [2, 3, 5], tolerance=5e-7) is KeptDifference.DIFFERENT

    def test_swap_of_a_clearly_better_token_is_different(self) -> None:
        assert self.classify([2, 3, 4], [3, 4, 5]) is KeptDifference.DIFFERENT

    def test_lowest_uses_its_own_edge(self) -> None:
        low = {"select": Select.LOWEST}
        assert self.classify([5, 6], [4, 6], **low) is KeptDifference.NEAR_TIE
        assert self.classify([5, 6], [3, 6], **low) is KeptDifference.DIFFERENT

    def test_other_numbers_repeats_and_text_positions_are_different(self) -> None:
        for other in ([2, 3], [2, 3, 3], [2, 3, 0], [2, 3, 4, 5]):
            assert self.classify([2, 3, 4], other) is KeptDifference.DIFFERENT

    def test_per_picture_needs_the_same_number_from_each(self) -> None:
        scores, index = np.array([1.0, 1.0, 1.0, 1.0]), np.array([0, 1, 5, 6])
        kept = np.array([0, 5])
        rest = {"visual_index": index, "budget": Budget.PER_PICTURE}
        assert kept_difference(scores, kept, np.array([1, 6]), 2, **rest) is KeptDifference.NEAR_TIE
        assert kept_difference(scores, kept, np.array([0, 1]), 2, **rest) is KeptDifference.DIFFERENT


def test_pictures_are_runs_of_consecutive_positions() -> None:
    assert picture_of(np.array([3, 4, 5, 7, 8, 20])).tolist() == [0, 0, 0, 1, 1, 2]
    assert picture_of(np.array([], dtype=np.int64)).tolist() == []


class TestExact:
    def test_the_best_scores_are_kept_in_float64(self) -> None:
        chooser = TopK(Scorer.ORDER2, Select.LOWEST)
        tokens = prompt(chooser, np.arange(4, 30), 34).tokens
        choice = choose(chooser, tokens, 5)
        rows = tokens.states.double().numpy()
        rows = rows - rows.mean(axis=1, keepdims=True)
        rows /= np.linalg.norm(rows, axis=2, keepdims=True)
        gram = rows @ rows.transpose(0, 2, 1) / rows.shape[1]
        scores = -np.log((gram**2).sum(axis=(1, 2)))
        np.testing.assert_allclose(choice.scores, scores, atol=1e-12)
        assert choice.kept.tolist() == sorted(4 + np.argsort(scores)[:5])

    def test_states_are_needed(self) -> None:
        tokens = prompt(TopK(), np.arange(4), 4).tokens
        bare = type(tokens)(tokens.hidden, None, tokens.visual_index)
        with pytest.raises(ValueError, match="paper-highest scores states, and there are none"):
            choose(TopK(), bare, 2)


class TestEntropyPrune:
    @pytest.mark.parametrize("budget", list(Budget))
    @pytest.mark.parametrize("select", list(Select))
    @pytest.mark.parametrize("scorer", list(Scorer))
    def test_selection_follows_the_rule_on_its_own_scores(
        self, scorer: Scorer, select: Select, budget: Budget
    ) -> None:
        chooser = TopK(scorer, select, budget=budget)
        visual = np.r_[4:24, 25:59]  # two pictures
        outputs = run(session(chooser, degree=16), prompt(chooser, visual, 70), 17)
        chosen = select_tokens(outputs["scores"], 17, select=select, visual_index=visual, budget=budget)
        np.testing.assert_array_equal(kept_positions(outputs), chosen)

    @pytest.mark.parametrize("opset", [20, 23])
    @pytest.mark.parametrize(
        ("scorer", "source"),
        [
            *itertools.product(Scorer, [source for source in Source if source is not Source.ATTENTION]),
            (Scorer.NORM, Source.ATTENTION),
        ],
    )
    def test_choice_is_the_exact_one_but_for_what_the_series_leaves_out(
        self, scorer: Scorer, source: Source, opset: int
    ) -> None:
        chooser = TopK(scorer, source=source)
        at = prompt(chooser, np.arange(5, 105), 110)
        outputs = run(session(chooser, opset=opset), at, 30)
        exact = token_scores(at.tokens.states, scorer)
        spread = approximation_spread(exact, torch.from_numpy(outputs["scores"])) + 1e-6
        found = difference(chooser, at.tokens, kept_positions(outputs), 30, tolerance=spread)
        assert found is not KeptDifference.DIFFERENT

    @pytest.mark.parametrize("select", list(Select))
    def test_scores_that_are_not_finite_are_dropped_first(self, select: Select) -> None:
        chooser = TopK(Scorer.NORM, select)
        at = prompt(chooser, np.arange(5, 15), 20)
        at.states[7, 0, 0], at.states[9, 1, 2], at.states[11] = np.nan, np.inf, 3e38
        outputs = run(session(chooser), at, 7)
        assert set(range(20)) - set(outputs["kept_index"].tolist()) == {7, 9, 11}

    @pytest.mark.parametrize("select", list(Select))
    def test_ties_keep_the_lower_positions(self, select: Select) -> None:
        chooser = TopK(select=select)
        at = prompt(chooser, np.arange(2, 12), 12)
        at.states[:] = at.states[0]
        assert run(session(chooser), at, 4)["kept_index"].tolist() == [0, 1, 2, 3, 4, 5]

    def test_one_position_of_one(self) -> None:
        at = prompt(TopK(), np.zeros(1), 1)
        assert run(session(TopK()), at, 1)["kept_index"].tolist() == [0]

    def test_half_precision_states_are_scored_in_float32(self) -> None:
        at = prompt(TopK(), np.arange(3, 33), 40)
        at.states[:] = at.states.astype(np.float16)
        half, single = (
            run(session(TopK(), dtype=dtype), at, 9) for dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)
        )
        np.testing.assert_array_equal(half["scores"], single["scores"])
        np.testing.assert_array_equal(half["kept_index"], single["kept_index"])

    def test_the_function_and_its_operators_alone_are_the_same_graph(self) -> None:
        from onnx_ir.passes.common import InlinePass

        from ep_export.choosers.component import build_prune

        chooser = TopK(budget=Budget.PER_PICTURE)
        model = build_prune(
            chooser, dims=DIMS, cut_layer=1, precision_dtype=ir.DataType.FLOAT, degree=64, opset=20
        )
        inlined = InlinePass()(ir.from_proto(ir.to_proto(model))).model
        assert all(node.domain == "" for node in inlined.graph)
        at = prompt(chooser, np.r_[3:20, 22:30], 33)
        import onnxruntime

        plain = onnxruntime.InferenceSession(ir.to_proto(inlined).SerializeToString())
        called = run(session(chooser, degree=64), at, 9)
        for name, value in run(plain, at, 9).items():
            np.testing.assert_array_equal(value, called[name])

    def test_node_says_what_a_plugin_needs(self) -> None:
        function, attributes = prune_function(
            TopK(Scorer.RELEASED, Select.LOWEST, Source.KEY, Budget.PER_PICTURE), heads=6, degree=16
        )
        assert (function.domain, function.name) == (DOMAIN, OP_TYPE) == ("ep_export", "EntropyPrune")
        assert attributes == {
            "scorer": "released",
            "select": "lowest",
            "budget": "per_picture",
            "plugin_namespace": "ep_export",
            "plugin_version": "2",
        }
        assert [value.name for value in function.inputs] == [
            "states",
            "hidden",
            "position_ids",
            "visual_index",
            "keep_slots",
        ]
        assert [value.name for value in function.outputs] == [
            "kept_hidden",
            "kept_position_ids",
            "kept_index",
            "kept_visual_index",
            "scores",
        ]


def test_scores_of_more_states_than_one_chunk_are_those_of_each() -> None:
    chooser = TopK(Scorer.NORM, Select.HIGHEST)
    states = spread_states(50, 6, 16)
    tokens = prompt(chooser, np.arange(50), 50).tokens
    tokens = type(tokens)(tokens.hidden, torch.from_numpy(states), tokens.visual_index)
    expected = np.linalg.norm(states.astype(np.float64).reshape(50, -1), axis=1)
    np.testing.assert_allclose(choose(chooser, tokens, 5).scores, expected, rtol=1e-12)

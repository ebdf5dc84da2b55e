from __future__ import annotations

import numpy as np
import pytest
import torch

from ep_export.entropy import KeptDifference, kept_difference, select_tokens
from ep_export.policy import Budget, Select


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

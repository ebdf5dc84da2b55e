"""The draw: the same in every runtime, uniform, and without structure between tokens or seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prune_graphs import kept_positions, prompt, run, session

from ep_export.choosers import CutTokens, KeptDifference, choose, difference
from ep_export.choosers.random_draw import draw_scores, round_keys
from ep_export.policy import Random


def tokens(count: int) -> CutTokens:
    return CutTokens(torch.zeros(count, 1), None, torch.arange(count) + 5)


def kept_mask(count: int, k: int, seed: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[choose(Random(seed), tokens(count), k).kept.numpy() - 5] = True
    return mask


SEEDS = 2000


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    """[seeds, tokens] bool: which 64 of 256 tokens stay."""
    return np.stack([kept_mask(256, 64, seed) for seed in range(SEEDS)])


def by_hand(token: int, seed: int) -> int:
    """The permutation of one token in Python's unbounded integers."""
    left, right = divmod(token, 4096)
    for a, b, c in round_keys(seed):
        left, right = right, (left + (a * right * right + b * right + c) % (2**31 - 1)) % 4096
    return 4096 * left + right


class TestNumbers:
    @pytest.mark.parametrize("seed", [0, 1, 7, 65535])
    def test_they_are_the_formula_without_overflow(self, seed: int) -> None:
        numbers = draw_scores(1 << 14, seed)
        for token in (0, 1, 4095, 4096, 16383):
            assert numbers[token] == by_hand(token, seed)

    def test_they_are_distinct_and_float32_holds_them(self) -> None:
        numbers = draw_scores(1 << 16, 3).numpy()
        assert len(np.unique(numbers)) == 1 << 16
        assert 0 <= numbers.min() <= numbers.max() < 1 << 24
        np.testing.assert_array_equal(numbers.astype(np.float32).astype(np.int64), numbers)

    def test_a_seed_always_gives_the_same(self) -> None:
        # Written down once: bundles of other versions must draw the same tokens.
        assert choose(Random(7), tokens(20), 5).kept.tolist() == [7, 8, 11, 18, 21]


class TestUniformity:
    def test_every_token_is_kept_about_equally_often(self, masks: np.ndarray) -> None:
        share = masks.mean(axis=0)
        deviation = np.sqrt(0.25 * 0.75 / SEEDS)
        assert np.abs(share - 0.25).max() < 4.5 * deviation  # of 256 normal ones the largest is about 3
        chi_square = (((share - 0.25) / deviation) ** 2).sum()
        assert abs(chi_square - 256) < 5 * np.sqrt(2 * 256)

    @pytest.mark.parametrize("distance", [1, 2, 3, 4, 16, 32, 64, 128])
    def test_tokens_near_each_other_are_kept_independently(self, masks: np.ndarray, distance: int) -> None:
        together = (masks[:, :-distance] & masks[:, distance:]).mean(axis=0)
        expected = 64 / 256 * 63 / 255
        deviation = np.sqrt(expected * (1 - expected) / SEEDS)
        assert np.abs(together - expected).max() < 5 * deviation
        # their mean over all pairs is far better known
        assert abs(together.mean() - expected) < 5 * deviation / np.sqrt(len(together))

    @pytest.mark.parametrize("distance", [1, 2, 256])
    def test_neighbouring_seeds_have_nothing_in_common(self, masks: np.ndarray, distance: int) -> None:
        common = (masks[:-distance] & masks[distance:]).sum(axis=1)
        # hypergeometric: 16 of 64 expected, standard deviation 3
        assert abs(common.mean() - 16) < 5 * 3 / np.sqrt(len(common))
        assert 0 < common.min() <= common.max() < 35

    def test_rows_and_columns_of_a_grid_keep_their_share(self) -> None:
        grids = np.stack([kept_mask(1024, 256, seed).reshape(32, 32) for seed in range(300)])
        deviation = np.sqrt(0.25 * 0.75 / (300 * 32))
        for axis in (1, 2):
            assert np.abs(grids.mean(axis=(0, axis)) - 0.25).max() < 4.5 * deviation

    def test_large_numbers_of_tokens_are_shared_out_evenly_too(self) -> None:
        mask = np.mean([kept_mask(16384, 4096, seed) for seed in range(40)], axis=0).reshape(64, 256)
        deviation = np.sqrt(0.25 * 0.75 / (40 * 256))
        assert np.abs(mask.mean(axis=1) - 0.25).max() < 4.5 * deviation


class TestRuntimes:
    @pytest.mark.parametrize("opset", [20, 23])
    @pytest.mark.parametrize("seed", [0, 1, 12345, 65535])
    @pytest.mark.parametrize(("count", "k"), [(1, 1), (50, 50), (50, 7), (5000, 1234)])
    def test_onnx_runtime_draws_the_same_tokens(self, count: int, k: int, seed: int, opset: int) -> None:
        chooser = Random(seed)
        at = prompt(chooser, np.arange(3, 3 + count), count + 4)
        outputs = run(session(chooser, opset=opset), at, k)
        exact = choose(chooser, at.tokens, k)
        assert torch.equal(kept_positions(outputs), exact.kept)
        np.testing.assert_array_equal(outputs["scores"], exact.scores)

    def test_only_the_number_of_a_token_counts_not_where_it_stands(self) -> None:
        chooser = Random(3)
        near, far = np.arange(40), np.r_[10:30, 50:70]
        places = [
            np.searchsorted(index, choose(chooser, prompt(chooser, index, 80).tokens, 9).kept.numpy())
            for index in (near, far)
        ]
        np.testing.assert_array_equal(*places)

    def test_any_other_set_is_different_whatever_the_tolerance(self) -> None:
        chooser = Random(3)
        seen = tokens(30)
        kept = choose(chooser, seen, 10).kept
        assert difference(chooser, seen, kept.flip(0), 10) is KeptDifference.EQUAL
        other = kept.clone()
        other[0] = next(i for i in range(5, 35) if i not in kept.tolist())
        assert difference(chooser, seen, other, 10, tolerance=1e9) is KeptDifference.DIFFERENT
        assert difference(chooser, seen, kept[:9], 10) is KeptDifference.DIFFERENT

    @pytest.mark.parametrize("k", [-1, 31])
    def test_impossible_numbers_are_refused(self, k: int) -> None:
        with pytest.raises(ValueError, match=f"cannot keep {k} of 30"):
            choose(Random(), tokens(30), k)

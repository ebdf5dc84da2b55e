"""DivPrune: the exact form against a full distance matrix, the Loop against the exact form, near-ties."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from prune_graphs import DIMS, Prompt, kept_positions, prompt, run, session

from ep_export.choosers import CutTokens, KeptDifference, choose, difference
from ep_export.choosers.greedy import FIRST_SCORE
from ep_export.choosers.max_min import farthest_first
from ep_export.policy import MaxMin

CHOOSER = MaxMin()


def by_matrix(rows: np.ndarray, k: int) -> list[int]:
    """The definition with the whole distance matrix, for finite rows."""
    exact = rows.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    unit = np.divide(exact, norms, out=np.zeros_like(exact), where=norms > 0)
    distance = 1 - unit @ unit.T
    others = distance + np.diag(np.full(len(rows), np.inf))
    chosen = [int(others.min(axis=1).argmax())]
    while len(chosen) < k:
        left = [i for i in range(len(rows)) if i not in chosen]
        nearest = distance[np.ix_(left, chosen)].min(axis=1)
        chosen.append(left[int(nearest.argmax())])
    return chosen


def clustered(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows around a few centres and a common direction, as hidden states are."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((7, width))
    rows = centres[rng.integers(0, 7, count)] + 0.3 * rng.standard_normal((count, width))
    return (rows + 2 * rng.standard_normal(width)).astype(np.float32)


def tokens_of(rows: np.ndarray, first: int = 3) -> CutTokens:
    return CutTokens(torch.from_numpy(rows), None, torch.arange(first, first + len(rows)))


def prompt_of(rows: np.ndarray) -> Prompt:
    """Three text tokens before the rows and two after."""
    base = prompt(CHOOSER, np.arange(3, 3 + len(rows)), len(rows) + 5)
    hidden = base.hidden.copy()
    hidden[base.visual_index] = rows
    return dataclasses.replace(base, hidden=hidden)


class TestExact:
    @pytest.mark.parametrize(("count", "k"), [(1, 1), (2, 1), (40, 1), (40, 13), (40, 39), (300, 120)])
    def test_order_follows_the_definition(self, count: int, k: int) -> None:
        rows = clustered(count, 24)
        assert farthest_first(torch.from_numpy(rows), k)[0].tolist() == by_matrix(rows, k)

    def test_the_start_is_the_same_whatever_the_block_of_rows(self) -> None:
        rows = clustered(600, 8)  # three blocks, the last one shorter
        assert farthest_first(torch.from_numpy(rows), 3)[0].tolist() == by_matrix(rows, 3)

    def test_kept_positions_ascend_and_all_are_kept_where_all_are_asked_for(self) -> None:
        tokens = tokens_of(clustered(30, 8))
        kept = choose(CHOOSER, tokens, 11).kept
        assert kept.tolist() == sorted(kept.tolist())
        assert choose(CHOOSER, tokens, 30).kept.tolist() == tokens.visual_index.tolist()

    def test_best_scores_are_the_choice_of_every_smaller_k(self) -> None:
        tokens = tokens_of(clustered(50, 16))
        scores = choose(CHOOSER, tokens, 50).scores
        assert scores.max() == FIRST_SCORE
        for k in (1, 7, 31):
            best = scores.argsort(descending=True, stable=True)[:k].sort().values
            assert torch.equal(tokens.visual_index[best], choose(CHOOSER, tokens, k).kept)

    def test_scores_of_dropped_tokens_are_distances_to_the_nearest_kept_one(self) -> None:
        rows = clustered(30, 16)
        order, scores = farthest_first(torch.from_numpy(rows), 4)
        unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        nearest = (1 - unit @ unit[order].T).min(axis=1)
        dropped = np.setdiff1d(np.arange(30), order)
        np.testing.assert_allclose(scores[dropped], nearest[dropped], atol=1e-12)

    def test_equal_tokens_go_by_the_lower_index(self) -> None:
        rows = np.tile(clustered(1, 13), (12, 1))
        assert farthest_first(torch.from_numpy(rows), 5)[0].tolist() == [0, 1, 2, 3, 4]

    def test_a_zero_row_is_at_right_angles_to_all(self) -> None:
        rows = np.array([[1, 0], [1, 0.1], [0, 0], [1, -0.1]], dtype=np.float32)
        order, scores = farthest_first(torch.from_numpy(rows), 2)
        assert order.tolist() == [2, 0]  # nearest neighbour at 1; the others tie at 1 from it
        assert scores.tolist()[:3:2] == [1.0, FIRST_SCORE]

    def test_tokens_that_are_not_finite_come_last_and_are_nobodys_neighbour(self) -> None:
        rows = clustered(20, 8)
        rows[[4, 9, 15], [0, 3, 5]] = np.nan, np.inf, -np.inf
        finite = [i for i in range(20) if i not in (4, 9, 15)]
        order = farthest_first(torch.from_numpy(rows), 20)[0].tolist()
        assert order[:17] == [finite[i] for i in by_matrix(rows[finite], 17)]
        assert order[17:] == [4, 9, 15]

    def test_one_finite_token_and_none(self) -> None:
        rows = torch.full((3, 4), torch.nan)
        assert farthest_first(rows, 2)[0].tolist() == [0, 1]
        rows[2] = 1.0
        assert farthest_first(rows, 2)[0].tolist() == [2, 0]

    @pytest.mark.parametrize("k", [-1, 0, 6])
    def test_impossible_numbers_are_refused(self, k: int) -> None:
        with pytest.raises(ValueError, match=f"cannot keep {k} of 5"):
            choose(CHOOSER, tokens_of(clustered(5, 4)), k)


class TestDifference:
    # Unit vectors at angles; the distance of two is 1 - cos of the angle between them.
    angles = np.array([0.0, 1e-4, 1.0, 2.0, 2.0 + 1e-4, 3.2])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    tokens = CutTokens(torch.from_numpy(rows), None, torch.arange(10, 16))

    def classify(self, kept: list[int], tolerance: float = 2e-6) -> KeptDifference:
        return difference(CHOOSER, self.tokens, torch.tensor(kept), len(kept), tolerance=tolerance)

    def exact(self, k: int) -> list[int]:
        return choose(CHOOSER, self.tokens, k).kept.tolist()

    def test_same_set_in_any_order_is_equal(self) -> None:
        assert self.classify(self.exact(3)[::-1]) is KeptDifference.EQUAL

    def test_a_twin_in_its_place_is_a_near_tie(self) -> None:
        twins = {10: 11, 11: 10, 13: 14, 14: 13}
        kept = self.exact(3)
        swapped = [twins.get(position, position) for position in kept]
        assert swapped != kept
        # the cosine of twins to a third token differs by up to sin(angle) x 1e-4
        assert self.classify(swapped, tolerance=2e-4) is KeptDifference.NEAR_TIE
        assert self.classify(swapped, tolerance=1e-9) is KeptDifference.DIFFERENT

    def test_both_twins_are_too_many(self) -> None:
        assert self.classify([13, 14, 15], tolerance=2e-4) is KeptDifference.DIFFERENT

    def test_other_numbers_repeats_and_text_positions_are_different(self) -> None:
        kept = self.exact(3)
        for other in (kept[:2], [*kept[:2], kept[1]], [*kept[:2], 3]):
            found = difference(CHOOSER, self.tokens, torch.tensor(other), 3, tolerance=1.0)
            assert found is KeptDifference.DIFFERENT

    def test_a_near_tie_at_the_start_explains_all_that_follows_from_it(self) -> None:
        # Two lonely tokens, equally far from their neighbours but for 1e-8; each start has its own sequel.
        rows = clustered(200, 3, seed=5)
        exact = torch.from_numpy(rows.astype(np.float64))
        order, _ = farthest_first(exact, 200)
        unit = exact / exact.norm(dim=1, keepdim=True)
        distance = 1 - unit @ unit.T
        lonely = (distance + torch.eye(200) * 9).min(dim=1).values
        second = int(lonely.argsort(descending=True)[1])
        gap = float(lonely.max() - lonely[second])
        chosen = [second]  # greedy from the second loneliest
        while len(chosen) < 20:
            nearest = distance[:, chosen].min(dim=1).values
            nearest[chosen] = -1
            chosen.append(int(nearest.argmax()))
        assert set(chosen) != set(order[:20].tolist())
        tokens, kept = CutTokens(exact, None, torch.arange(200)), torch.tensor(chosen)
        assert difference(CHOOSER, tokens, kept, 20, tolerance=1.01 * gap) is KeptDifference.NEAR_TIE
        assert difference(CHOOSER, tokens, kept, 20, tolerance=0.5 * gap) is KeptDifference.DIFFERENT

    @pytest.mark.parametrize("seed", range(5))
    def test_any_greedy_run_with_errors_below_the_tolerance_is_a_near_tie(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = clustered(150, 4, seed=seed).astype(np.float64)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        noise = rng.uniform(-1e-3, 1e-3, (150, 150))
        distance = 1 - unit @ unit.T + noise + noise.T  # off by up to 2e-3
        others = distance + np.diag(np.full(150, 9.0))
        chosen = [int(others.min(axis=1).argmax())]
        while len(chosen) < 40:
            nearest = distance[:, chosen].min(axis=1)
            nearest[chosen] = -9
            chosen.append(int(nearest.argmax()))
        tokens = CutTokens(torch.from_numpy(rows), None, torch.arange(150))
        kept = torch.tensor(chosen)
        assert set(chosen) != set(choose(CHOOSER, tokens, 40).kept.tolist())
        # both the token and its rival may be off by 2e-3
        assert difference(CHOOSER, tokens, kept, 40, tolerance=4e-3) is KeptDifference.NEAR_TIE
        assert difference(CHOOSER, tokens, kept, 40, tolerance=1e-6) is KeptDifference.DIFFERENT

    @pytest.mark.parametrize("seed", range(5))
    def test_random_sets_and_one_wrong_token_are_different(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        tokens = tokens_of(clustered(120, 16, seed))
        drawn = tokens.visual_index[np.sort(rng.permutation(120)[:30])]
        assert difference(CHOOSER, tokens, drawn, 30, tolerance=1e-3) is KeptDifference.DIFFERENT
        order, scores = farthest_first(tokens.hidden, 30)
        order[-1] = int(scores.argmin())  # the token that is nearest to the kept ones in place of the last
        wrong = tokens.visual_index[order]
        assert difference(CHOOSER, tokens, wrong, 30, tolerance=1e-3) is KeptDifference.DIFFERENT

    def test_equal_tokens_may_be_kept_in_any_choice(self) -> None:
        rows = np.tile(clustered(1, 13), (300, 1))
        tokens = tokens_of(rows, first=0)
        kept = torch.arange(100, 250)
        assert difference(CHOOSER, tokens, kept, 150) is KeptDifference.NEAR_TIE


class TestBody:
    def judge(self, rows: np.ndarray, k: int, opset: int = 20) -> KeptDifference:
        at = prompt_of(rows)
        outputs = run(session(CHOOSER, opset=opset), at, k)
        return difference(CHOOSER, at.tokens, kept_positions(outputs), k)

    @pytest.mark.parametrize("opset", [20, 23])
    @pytest.mark.parametrize(
        ("count", "k"), [(1, 1), (2, 1), (2, 2), (40, 13), (40, 40), (255, 9), (256, 9), (257, 9), (700, 350)]
    )
    def test_choice_is_the_exact_one(self, count: int, k: int, opset: int) -> None:
        found = self.judge(clustered(count, DIMS.hidden_size, seed=count), k, opset)
        assert found is KeptDifference.EQUAL

    @pytest.mark.parametrize("seed", range(4))
    def test_near_ties_are_all_that_differs_among_many_tokens_that_hardly_do(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        base = rng.standard_normal(DIMS.hidden_size)
        rows = (base + 0.02 * rng.standard_normal((500, DIMS.hidden_size))).astype(np.float32)
        assert self.judge(rows, 200) is not KeptDifference.DIFFERENT

    @pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e37])
    def test_scale_of_a_token_does_not_matter(self, scale: float) -> None:
        rows = clustered(60, DIMS.hidden_size)
        rows[::3] *= np.float32(scale)
        assert self.judge(rows, 25) is KeptDifference.EQUAL

    def test_hostile_tokens(self) -> None:
        rows = clustered(60, DIMS.hidden_size)
        rows[[3, 14]] = 0
        rows[20:30] = rows[20]
        rows[[5, 40, 41], [0, 7, 9]] = np.nan, np.inf, -np.inf
        rows[50] = np.nan
        for k in (1, 10, 50, 56, 58, 60):
            assert self.judge(rows, k) is not KeptDifference.DIFFERENT
        outputs = run(session(CHOOSER), prompt_of(rows), 56)
        assert sorted({3 + 5, 3 + 40, 3 + 41, 3 + 50} & set(kept_positions(outputs).tolist())) == []

    def test_all_rows_zero_or_not_finite(self) -> None:
        for value in (0.0, np.nan, np.inf):
            rows = np.full((9, DIMS.hidden_size), value, dtype=np.float32)
            assert self.judge(rows, 4) is KeptDifference.EQUAL  # the lower index first

    def test_scores_are_the_exact_ones(self) -> None:
        rows = clustered(80, DIMS.hidden_size)
        rows[7] = np.nan
        at = prompt_of(rows)
        exact = choose(CHOOSER, at.tokens, 30).scores
        np.testing.assert_allclose(run(session(CHOOSER), at, 30)["scores"], exact, atol=2e-6)

    def test_half_precision_rows_are_compared_in_float32(self) -> None:
        import onnx_ir as ir

        rows = clustered(200, DIMS.hidden_size).astype(np.float16).astype(np.float32)
        at = prompt_of(rows)
        outputs = run(session(CHOOSER, dtype=ir.DataType.FLOAT16), at, 60)
        assert outputs["kept_hidden"].dtype == np.float16
        assert difference(CHOOSER, at.tokens, kept_positions(outputs), 60) is KeptDifference.EQUAL


_LARGE = """
import resource, sys
sys.path.insert(0, {here!r})
import dataclasses
import numpy as np
from prune_graphs import kept_positions, prompt, run, session
from ep_export.choosers import difference
from ep_export.policy import MaxMin
at = prompt(MaxMin(), np.arange(2, 16386), 16390)
opened = session(MaxMin())
run(opened, prompt(MaxMin(), np.arange(2, 12), 14), 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outputs = run(opened, at, 40)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
print(difference(MaxMin(), at.tokens, kept_positions(outputs), 40).value)
"""


def test_16384_tokens_need_no_distance_matrix() -> None:
    """Which would be 1 GB; rows are 3 MB and blocks of distances 16 MB."""
    here = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _LARGE.format(here=here)], check=True, capture_output=True, text=True
    )
    megabytes, found = done.stdout.split()
    assert int(megabytes) < 200
    assert found in {"equal", "near_tie"}

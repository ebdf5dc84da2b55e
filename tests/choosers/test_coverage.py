"""Importance times distance: by hand, the definition with a whole matrix, the Loop, near-ties."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from prune_graphs import DIMS, Prompt, kept_positions, prompt, run, session, spread_states

from ep_export.choosers import CutTokens, KeptDifference, choose, difference
from ep_export.choosers.coverage import importance
from ep_export.choosers.greedy import FIRST_SCORE
from ep_export.entropy import token_scores
from ep_export.policy import Coverage, Scorer, Select, Source

NORM = Coverage(Scorer.NORM)
FORMS = [Coverage(scorer, select) for scorer in Scorer for select in Select]


def by_matrix(weights: np.ndarray, rows: np.ndarray, k: int) -> list[int]:
    """The definition with the whole distance matrix, for finite rows."""
    exact = rows.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    unit = np.divide(exact, norms, out=np.zeros_like(exact), where=norms > 0)
    gain = weights[:, None] * (1 - unit @ unit.T)
    chosen = [int(weights.argmax())]
    while len(chosen) < k:
        left = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(left[int(gain[np.ix_(left, chosen)].min(axis=1).argmax())])
    return chosen


def weights_of(states: np.ndarray, chooser: Coverage) -> np.ndarray:
    """Importance as the module defines it, in NumPy."""
    scores = token_scores(torch.from_numpy(states), chooser.scorer).numpy()
    sign = 1 if chooser.select is Select.HIGHEST else -1
    nats = chooser.scorer in (Scorer.PAPER, Scorer.ORDER2)
    even = 1e-3 if nats else 1e-3 * np.abs(scores).max()
    return (sign * scores - (sign * scores).min() + even) / (np.ptp(scores) + even)


def arrived(count: int, seed: int = 0, heads: int = DIMS.heads) -> CutTokens:
    hidden = spread_states(count, 1, DIMS.hidden_size, seed)[:, 0]
    states = spread_states(count, heads, DIMS.head_dim, seed + 1)
    return CutTokens(torch.from_numpy(hidden), torch.from_numpy(states), torch.arange(3, 3 + count))


def prompt_of(hidden: np.ndarray, states: np.ndarray) -> Prompt:
    """Three text tokens before the visual ones and two after."""
    base = prompt(NORM, np.arange(3, 3 + len(hidden)), len(hidden) + 5)
    changed = base.hidden.copy(), np.zeros((len(hidden) + 5, *states.shape[1:]), dtype=np.float32)
    for array, rows in zip(changed, (hidden, states), strict=True):
        array[base.visual_index] = rows
    return dataclasses.replace(base, hidden=changed[0], states=changed[1])


class TestExact:
    def test_by_hand_on_four_tokens(self) -> None:
        """Norms 4, 3, 2, 1; the second copies the first, the third is at right angles, the last opposite."""
        hidden = torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]])
        states = torch.tensor([4.0, 3, 2, 1])[:, None, None] * torch.ones(4, 1, 1)
        tokens = CutTokens(hidden, states, torch.arange(10, 14))
        # e = 0.004: importance 1, 0.667, 0.334, 0.0013; then the third gains 0.334 x 1, the last 0.0013 x 2
        weights = np.array([3.004, 2.004, 1.004, 0.004]) / 3.004
        np.testing.assert_allclose(importance(states.flatten().double(), NORM), weights, atol=1e-11)
        assert choose(NORM, tokens, 1).kept.tolist() == [10]
        assert choose(NORM, tokens, 2).kept.tolist() == [10, 12]
        choice = choose(NORM, tokens, 3)
        assert choice.kept.tolist() == [10, 12, 13]  # a copy of what is kept adds nothing, however important
        wanted = [FIRST_SCORE, 0.0, weights[2], weights[3]]  # the last is at distance 1 from the third
        np.testing.assert_allclose(choice.scores, wanted, atol=1e-11)

    @pytest.mark.parametrize("chooser", FORMS, ids=lambda chooser: chooser.name)
    @pytest.mark.parametrize(("count", "k"), [(1, 1), (2, 2), (40, 13), (40, 40)])
    def test_choice_follows_the_definition(self, chooser: Coverage, count: int, k: int) -> None:
        tokens = arrived(count)
        order = by_matrix(weights_of(tokens.states.numpy(), chooser), tokens.hidden.numpy(), k)
        assert choose(chooser, tokens, k).kept.tolist() == sorted(3 + number for number in order)

    def test_best_scores_are_the_choice_of_every_smaller_k(self) -> None:
        tokens = arrived(50)
        scores = choose(NORM, tokens, 50).scores
        for k in (1, 7, 31):
            best = scores.argsort(descending=True, stable=True)[:k].sort().values
            assert torch.equal(tokens.visual_index[best], choose(NORM, tokens, k).kept)

    def test_equal_scores_leave_distance_alone(self) -> None:
        tokens = dataclasses.replace(arrived(30), states=torch.ones(30, 6, 16))
        order = by_matrix(np.ones(30), tokens.hidden.numpy(), 9)
        assert choose(NORM, tokens, 9).kept.tolist() == sorted(3 + number for number in order)

    def test_equal_tokens_go_by_the_lower_index(self) -> None:
        one = arrived(1)
        tokens = CutTokens(one.hidden.repeat(12, 1), one.states.repeat(12, 1, 1), torch.arange(12))
        for chooser in FORMS:
            assert choose(chooser, tokens, 5).kept.tolist() == [0, 1, 2, 3, 4]

    def test_tokens_that_are_not_finite_come_last(self) -> None:
        tokens = arrived(20)
        tokens.hidden[4, 0], tokens.states[9, 1, 2] = torch.nan, torch.inf
        assert not {7, 12} & set(choose(NORM, tokens, 18).kept.tolist())
        assert choose(NORM, tokens, 19).kept.tolist() == [p for p in range(3, 23) if p != 12]
        lost = CutTokens(tokens.hidden * torch.nan, tokens.states, tokens.visual_index)
        assert choose(NORM, lost, 2).kept.tolist() == [3, 4]

    @pytest.mark.parametrize("k", [-1, 0, 6])
    def test_impossible_numbers_are_refused(self, k: int) -> None:
        with pytest.raises(ValueError, match=f"cannot keep {k} of 5"):
            choose(NORM, arrived(5), k)

    def test_states_are_needed(self) -> None:
        with pytest.raises(ValueError, match="coverage-norm-highest scores states, and there are none"):
            choose(NORM, dataclasses.replace(arrived(5), states=None), 2)


class TestDifference:
    @pytest.mark.parametrize("seed", range(4))
    def test_a_greedy_run_with_errors_below_the_tolerance_is_a_near_tie(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        tokens = arrived(400, seed)
        weights = weights_of(tokens.states.numpy(), NORM) + rng.uniform(-1e-2, 1e-2, 400)
        other = torch.tensor([3 + i for i in by_matrix(weights, tokens.hidden.numpy(), 150)]).sort().values
        assert not torch.equal(other, choose(NORM, tokens, 150).kept)
        # distances reach 2, and both the token and its rival may be off by 1e-2
        assert difference(NORM, tokens, other, 150, tolerance=4e-2) is KeptDifference.NEAR_TIE
        assert difference(NORM, tokens, other, 150, tolerance=1e-7) is KeptDifference.DIFFERENT

    def test_random_sets_and_other_numbers_are_different(self) -> None:
        tokens = arrived(120)
        drawn = tokens.visual_index[np.sort(np.random.default_rng(0).permutation(120)[:30])]
        assert difference(NORM, tokens, drawn, 30, tolerance=1e-3) is KeptDifference.DIFFERENT
        exact = choose(NORM, tokens, 30).kept
        assert difference(NORM, tokens, exact, 30) is KeptDifference.EQUAL
        assert difference(NORM, tokens, exact[:29], 30, tolerance=1.0) is KeptDifference.DIFFERENT


class TestBody:
    def judge(self, chooser: Coverage, at: Prompt, k: int, *, opset: int = 20) -> KeptDifference:
        outputs = run(session(chooser, opset=opset), at, k)
        # what the series moves a score by, over the spread of scores, times a distance of up to 2
        return difference(chooser, at.tokens, kept_positions(outputs), k, tolerance=3e-5)

    @pytest.mark.parametrize("opset", [20, 23])
    @pytest.mark.parametrize("chooser", FORMS, ids=lambda chooser: chooser.name)
    def test_choice_is_the_exact_one(self, chooser: Coverage, opset: int) -> None:
        for count, k in ((1, 1), (2, 1), (40, 13), (40, 40), (300, 90)):
            at = prompt(chooser, np.arange(2, 2 + count), count + 4, seed=count)
            assert self.judge(chooser, at, k, opset=opset) is not KeptDifference.DIFFERENT

    @pytest.mark.parametrize("source", [Source.KEY, Source.VALUE, Source.HIDDEN, Source.ATTENTION])
    def test_every_source_is_scored(self, source: Source) -> None:
        chooser = Coverage(Scorer.NORM, Select.LOWEST, source)
        at = prompt(chooser, np.arange(2, 62), 64)
        assert self.judge(chooser, at, 25) is KeptDifference.EQUAL

    def test_scores_are_the_exact_ones(self) -> None:
        at = prompt(NORM, np.arange(2, 82), 84)
        exact = choose(NORM, at.tokens, 30).scores
        np.testing.assert_allclose(run(session(NORM), at, 30)["scores"], exact, atol=2e-6)

    def test_hostile_tokens(self) -> None:
        tokens = arrived(60)
        hidden, states = tokens.hidden.numpy(), tokens.states.numpy()
        hidden[[3, 14]] = 0
        hidden[20:30], states[20:30] = hidden[20], states[20]
        hidden[[5, 40], [0, 7]] = np.nan, np.inf
        states[[41, 50], 0, 0] = -np.inf, np.nan
        states[10] = 0
        at = prompt_of(hidden, states)
        for chooser in (NORM, Coverage(), Coverage(Scorer.RELEASED, Select.LOWEST)):
            for k in (1, 10, 50, 56, 58, 60):
                assert self.judge(chooser, at, k) is not KeptDifference.DIFFERENT
            kept = set(kept_positions(run(session(chooser), at, 56)).tolist())
            assert not {3 + 5, 3 + 40, 3 + 41, 3 + 50} & kept

    def test_all_scores_zero_equal_or_not_finite(self) -> None:
        hidden = arrived(9).hidden.numpy()
        for value in (0.0, 3.0, np.nan, np.inf):
            at = prompt_of(hidden, np.full((9, DIMS.heads, DIMS.head_dim), value, dtype=np.float32))
            for chooser in (NORM, Coverage()):
                assert self.judge(chooser, at, 4) is KeptDifference.EQUAL

    def test_half_precision_is_scored_in_float32(self) -> None:
        import onnx_ir as ir

        tokens = arrived(200)
        half = [
            array.numpy().astype(np.float16).astype(np.float32) for array in (tokens.hidden, tokens.states)
        ]
        at = prompt_of(*half)
        outputs = run(session(NORM, dtype=ir.DataType.FLOAT16), at, 60)
        assert outputs["kept_hidden"].dtype == np.float16
        assert difference(NORM, at.tokens, kept_positions(outputs), 60) is not KeptDifference.DIFFERENT


_LARGE = """
import resource, sys
sys.path.insert(0, {here!r})
import numpy as np
from prune_graphs import kept_positions, prompt, run, session
from ep_export.choosers import difference
from ep_export.policy import Coverage, Scorer
chooser = Coverage(Scorer.NORM)
at = prompt(chooser, np.arange(2, 16386), 16390)
opened = session(chooser)
run(opened, prompt(chooser, np.arange(2, 12), 14), 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outputs = run(opened, at, 40)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
print(difference(chooser, at.tokens, kept_positions(outputs), 40).value)
"""


def test_16384_tokens_need_no_distance_matrix() -> None:
    """Which would be 1 GB; rows are 3 MB, states 6 MB."""
    here = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _LARGE.format(here=here)], check=True, capture_output=True, text=True
    )
    megabytes, verdict = done.stdout.split()
    assert int(megabytes) < 200
    assert verdict in {"equal", "near_tie"}

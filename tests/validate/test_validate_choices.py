"""When a kept set that differs is a near-tie and when it is wrong, on scores made for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ep_export.choosers import CutTokens
from ep_export.dims import DecoderDims
from ep_export.policy import (
    Budget,
    Coverage,
    Cut,
    Keep,
    MaxMin,
    Random,
    Schedule,
    Scorer,
    Select,
    Threshold,
    TopK,
)
from ep_export.validate import Verdict
from ep_export.validate.choices import (
    choice_tolerance,
    compare_choice,
    compare_own_tokens,
    graph_spread,
)

TOLERANCE = 1e-3
VISUAL = np.array([3, 4, 5, 6, 9, 10, 11, 12])
"""Two pictures of four tokens."""
SIZES = [8.0, 5.0004, 5.0, 1.0, 7.0, 6.0, 2.0, 3.0]


def tokens(sizes):
    """Tokens with these norms."""
    states = torch.zeros(len(sizes), 1, 4)
    states[:, 0, 0] = torch.tensor(sizes)
    return CutTokens(states.flatten(1), states, torch.from_numpy(VISUAL))


def judged(sizes, kept, k=4, select=Select.HIGHEST, budget=Budget.JOINT):
    chooser = TopK(Scorer.NORM, select, budget=budget)
    return compare_choice("case", chooser, tokens(sizes), VISUAL[kept], k, TOLERANCE)


def test_the_exact_choice_passes():
    assert judged(SIZES, [0, 1, 4, 5]).verdict is Verdict.PASS


def test_a_swap_of_near_duplicates_is_ambiguous():
    found = judged(SIZES, [0, 2, 4, 5])
    assert found.verdict is Verdict.AMBIGUOUS
    assert found.error == pytest.approx(4e-4, rel=2e-2)
    assert found.note.startswith("1 of 4 kept tokens differ")


def test_a_swap_of_exact_duplicates_is_ambiguous():
    found = judged([5.0] * 8, [4, 5, 6, 7])
    assert (found.verdict, found.error) == (Verdict.AMBIGUOUS, 0.0)


def test_a_swap_beyond_the_tolerance_fails():
    found = judged(SIZES, [0, 1, 4, 7])
    assert found.verdict is Verdict.FAIL
    assert found.error == pytest.approx(2.0004, rel=2e-2)


def test_the_other_direction_fails():
    assert judged(SIZES, [1, 2, 3, 6]).verdict is Verdict.FAIL
    assert judged(SIZES, [3, 6, 7], k=3, select=Select.LOWEST).verdict is Verdict.PASS


def test_another_number_of_tokens_fails():
    found = judged(SIZES, [0, 1, 4])
    assert found.verdict is Verdict.FAIL
    assert found.error == np.inf
    assert found.note == "3 tokens kept, expected 4"


def test_a_near_tie_is_judged_within_its_picture():
    """5.0 is near the joint edge, but its picture's last kept token is 5.0004, the other's is 6."""

    def per_picture(kept):
        return judged(SIZES, kept, budget=Budget.PER_PICTURE).verdict

    assert per_picture([0, 1, 4, 5]) is Verdict.PASS
    assert per_picture([0, 2, 4, 5]) is Verdict.AMBIGUOUS
    assert per_picture([0, 1, 2, 4]) is Verdict.FAIL


def test_a_draw_has_no_near_ties():
    found = compare_choice("case", Random(), tokens([5.0] * 8), VISUAL[:4], 4, 1e9)
    assert found.verdict is Verdict.FAIL


def test_the_tolerance_grows_with_what_half_precision_moves():
    """Rounding states to 8 bits moves entropies by 1e-3, distances by 1e-4."""
    dims = DecoderDims(4, 64, 4, 2, 16, 128, 100, 1000, 3)
    random = torch.Generator().manual_seed(0)
    states = torch.randn(8, 4, 16, generator=random)
    exact = CutTokens(states.flatten(1), states, torch.from_numpy(VISUAL))
    rough = states.bfloat16().float()
    half = CutTokens(rough.flatten(1), rough, exact.visual_index)
    for chooser in (TopK(), MaxMin(), Coverage()):
        near = choice_tolerance(dims, chooser, exact, spread=1e-6, layers=4)
        far = choice_tolerance(dims, chooser, exact, spread=1e-6, layers=4, half=half)
        assert 1e-6 < near < 1e-4 < far < 0.1
    assert choice_tolerance(dims, Random(), exact, spread=1e-6, layers=4, half=half) == 1e-6


def test_the_graphs_own_spread_is_measured_on_its_scores():
    exact = tokens(SIZES)
    moved = np.array(SIZES, dtype=np.float32)
    moved[0] += 0.25
    spread = graph_spread(TopK(Scorer.NORM), exact, moved, degree=512)
    assert spread == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize(
    ("k", "verdict"),
    [(4, Verdict.PASS), (3, Verdict.AMBIGUOUS), (5, Verdict.AMBIGUOUS), (2, Verdict.FAIL), (6, Verdict.FAIL)],
)
def test_a_prompt_may_keep_one_more_or_fewer_where_a_score_lies_at_its_threshold(k, verdict):
    """Norms 8, 7, 6 and 5.0004 are at least 5.0002; 5.0004 and 5.0 are nearer to it than the tolerance."""
    threshold = Threshold(layer=1, policy="norm-highest", value=5.0002, floor=0.3, ceiling=1.0, pictures=9)
    keep = Keep(ratio=0.5, adaptive=True, threshold=threshold)
    schedule = Schedule((Cut(1, TopK(Scorer.NORM)),))
    judged = compare_own_tokens("case", keep, schedule, tokens(SIZES), k, TOLERANCE, layers=4)
    assert judged.verdict is verdict
    assert judged.error == abs(k - 4)

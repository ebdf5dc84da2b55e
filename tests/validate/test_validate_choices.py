"""When a kept set that differs is a near-tie and when it is wrong, on scores made for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ep_export.policy import Budget, Policy, Scorer, Select
from ep_export.validate import Verdict
from ep_export.validate.choices import _choice

TOLERANCE = 1e-3
VISUAL = np.array([3, 4, 5, 6, 9, 10, 11, 12])
"""Two pictures of four tokens."""


def case(sizes, k):
    """A case whose tokens have these norms, scored by norm."""
    states = torch.zeros(len(sizes), 1, 4)
    states[:, 0, 0] = torch.tensor(sizes)
    return SimpleNamespace(
        free=SimpleNamespace(states=states),
        prompt=SimpleNamespace(visual_index=VISUAL),
        question=SimpleNamespace(name="case"),
        k=k,
    )


def setting(select=Select.HIGHEST, budget=Budget.JOINT):
    policy = Policy(1, Scorer.NORM, select, budget=budget)
    return SimpleNamespace(manifest=SimpleNamespace(policy=policy))


SIZES = [8.0, 5.0004, 5.0, 1.0, 7.0, 6.0, 2.0, 3.0]


def test_the_oracles_own_choice_passes():
    assert _choice(setting(), case(SIZES, 4), VISUAL[[0, 1, 4, 5]], TOLERANCE).verdict is Verdict.PASS


def test_a_swap_of_near_duplicates_is_ambiguous():
    found = _choice(setting(), case(SIZES, 4), VISUAL[[0, 2, 4, 5]], TOLERANCE)
    assert found.verdict is Verdict.AMBIGUOUS
    assert found.error == pytest.approx(4e-4, rel=1e-2)
    assert found.note.startswith("1 of 4 kept tokens differ")


def test_a_swap_of_exact_duplicates_is_ambiguous():
    found = _choice(setting(), case([5.0] * 8, 4), VISUAL[4:], TOLERANCE)
    assert (found.verdict, found.error) == (Verdict.AMBIGUOUS, 0.0)


def test_a_swap_beyond_the_tolerance_fails():
    found = _choice(setting(), case(SIZES, 4), VISUAL[[0, 1, 4, 7]], TOLERANCE)
    assert found.verdict is Verdict.FAIL
    assert found.error == pytest.approx(2.0004, rel=1e-3)


def test_the_other_direction_fails():
    kept = VISUAL[[1, 2, 3, 6]]
    assert _choice(setting(), case(SIZES, 4), kept, TOLERANCE).verdict is Verdict.FAIL
    assert (
        _choice(setting(Select.LOWEST), case(SIZES, 3), VISUAL[[3, 6, 7]], TOLERANCE).verdict is Verdict.PASS
    )


def test_another_number_of_tokens_fails():
    found = _choice(setting(), case(SIZES, 4), VISUAL[[0, 1, 4]], TOLERANCE)
    assert found.verdict is Verdict.FAIL
    assert found.error == np.inf


def test_a_near_tie_is_judged_within_its_picture():
    """5.0 is near the joint edge, but its picture's last kept token is 5.0004, the other's is 6."""
    per_picture = setting(budget=Budget.PER_PICTURE)
    assert _choice(per_picture, case(SIZES, 4), VISUAL[[0, 1, 4, 5]], TOLERANCE).verdict is Verdict.PASS
    assert _choice(per_picture, case(SIZES, 4), VISUAL[[0, 2, 4, 5]], TOLERANCE).verdict is Verdict.AMBIGUOUS
    assert _choice(per_picture, case(SIZES, 4), VISUAL[[0, 1, 2, 4]], TOLERANCE).verdict is Verdict.FAIL

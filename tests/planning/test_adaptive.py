"""Keeps of every prompt's own: thresholds fitted and followed, against counting by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ep_export.adaptive import bounds, check_adaptive, fit_threshold, own_tokens
from ep_export.documents import decode, encode
from ep_export.errors import UsageError, UserError
from ep_export.planning import kept_tokens
from ep_export.policy import (
    Budget,
    Coverage,
    Cut,
    Keep,
    MaxMin,
    Nothing,
    Random,
    Schedule,
    Scorer,
    Select,
    TopK,
)

LAYERS = 8
HIGHEST = Schedule((Cut(2, TopK(Scorer.NORM)),))
LOWEST = Schedule((Cut(2, TopK(Scorer.NORM, Select.LOWEST)),))


def pictures(count: int = 12, seed: int = 0) -> list[np.ndarray]:
    """Pictures of different sizes, some richer than others."""
    rng = np.random.default_rng(seed)
    return [rng.normal(rng.normal(), 1.0, rng.integers(40, 400)) for _ in range(count)]


def average_of(keep: Keep, schedule: Schedule, scored: list[np.ndarray]) -> float:
    """Share over all layers, mean over pictures."""
    layer = schedule.cuts[0].layer
    kept = [own_tokens(keep, s, schedule, layers=LAYERS, visual_tokens=len(s)) for s in scored]
    shares = [k / len(scores) for k, scores in zip(kept, scored, strict=True)]
    return float(np.mean([(layer + (LAYERS - layer) * share) / LAYERS for share in shares]))


@pytest.mark.parametrize("schedule", [HIGHEST, LOWEST, Schedule((Cut(0, MaxMin()),))], ids=str)
@pytest.mark.parametrize("average", [0.3, 0.5, 0.9])
def test_the_average_over_the_pictures_is_what_was_asked_for(schedule: Schedule, average: float) -> None:
    scored = pictures()
    keep = fit_threshold(average, schedule, scored, layers=LAYERS)
    # one token of the smallest picture, averaged over twelve
    assert average_of(keep, schedule, scored) == pytest.approx(average, abs=1 / 40 / 12)
    assert keep.threshold is not None
    assert keep.threshold.pictures == 12


def test_a_picture_keeps_the_tokens_that_score_well_enough() -> None:
    keep = fit_threshold(0.5, HIGHEST, pictures(), layers=LAYERS)
    value = keep.threshold.value
    scores = np.concatenate([np.full(30, value + 0.1), np.full(70, value - 0.1), [np.nan]])
    assert own_tokens(keep, scores, HIGHEST, layers=LAYERS, visual_tokens=101) == 30
    lowest = fit_threshold(0.5, LOWEST, [-one for one in pictures()], layers=LAYERS)
    assert lowest.threshold.value == -value
    assert own_tokens(lowest, -scores, LOWEST, layers=LAYERS, visual_tokens=101) == 30


def test_floor_and_ceiling_hold() -> None:
    """Half and twice the average over all layers: with K = 2 of 8, keep 0.4 is 20 % behind the cut."""
    keep = fit_threshold(0.4, HIGHEST, pictures(), layers=LAYERS)
    assert (keep.threshold.floor, keep.threshold.ceiling) == (0.25, 0.8)  # two of eight layers see all
    assert bounds(keep, HIGHEST, layers=LAYERS, visual_tokens=100) == (1, 73)
    for scores, k in ((np.full(100, -9.0), 1), (np.full(100, 9.0), 73), (np.full(100, np.nan), 1)):
        assert own_tokens(keep, scores, HIGHEST, layers=LAYERS, visual_tokens=100) == k
    assert keep.largest == Keep(ratio=0.8)


def test_everything_is_kept_at_keep_one() -> None:
    keep = fit_threshold(1.0, HIGHEST, pictures(), layers=LAYERS)
    assert average_of(keep, HIGHEST, pictures()) == 1.0


def test_equal_scores_give_every_picture_the_same_bound() -> None:
    keep = fit_threshold(0.5, HIGHEST, [np.ones(100)] * 3, layers=LAYERS)
    counts = {own_tokens(keep, np.ones(100), HIGHEST, layers=LAYERS, visual_tokens=100)}
    assert counts <= set(bounds(keep, HIGHEST, layers=LAYERS, visual_tokens=100))


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (Schedule((Cut(1, TopK(), 0.5), Cut(2, TopK(), 0.2))), "goes with one cut, the schedule has 2"),
        (Schedule((Cut(2, Random()),)), "policy random has no scores"),
        (Schedule((Cut(2, Nothing()),)), "policy nothing has no scores"),
        (Schedule((Cut(2, TopK(budget=Budget.PER_PICTURE)),)), "policy paper-highest-per-picture has no"),
    ],
)
def test_schedules_without_scores_that_decide_are_refused(schedule: Schedule, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        fit_threshold(0.5, schedule, pictures(), layers=LAYERS)


def test_a_threshold_of_another_policy_or_layer_is_refused() -> None:
    keep = fit_threshold(0.5, HIGHEST, pictures(), layers=LAYERS)
    check_adaptive(keep, HIGHEST)
    check_adaptive(Keep(ratio=0.5), LOWEST)
    for other in (LOWEST, Schedule((Cut(3, TopK(Scorer.NORM)),)), Schedule((Cut(2, Coverage()),))):
        with pytest.raises(
            UsageError, match="the adaptive keep is for policy norm-highest at layer 2"
        ) as caught:
            check_adaptive(keep, other)
        assert "fixed --keep 0.5" in caught.value.hint


@pytest.mark.parametrize("scored", [[], [np.full(10, np.nan)]], ids=("none", "not finite"))
def test_no_picture_with_a_score_is_refused(scored: list[np.ndarray]) -> None:
    with pytest.raises(UserError, match="needs pictures to be fitted to"):
        fit_threshold(0.5, HIGHEST, scored, layers=LAYERS)


@pytest.mark.parametrize("average", [0.1, 0.2])
def test_an_impossible_average_is_refused(average: float) -> None:
    with pytest.raises(UsageError, match="below the smallest possible"):
        fit_threshold(average, HIGHEST, pictures(), layers=LAYERS)


def test_it_reads_back_as_written_and_says_what_it_is() -> None:
    keep = fit_threshold(0.5, HIGHEST, pictures(), layers=LAYERS)
    assert decode(Keep, encode(keep)) == keep
    assert str(keep) == "adaptive:0.5"
    assert decode(Keep, {"ratio": 0.25, "tokens": None}) == Keep(ratio=0.25)
    assert dataclasses.replace(keep, threshold=None) == Keep(ratio=0.5, adaptive=True)


def test_an_adaptive_keep_without_a_threshold_is_refused() -> None:
    with pytest.raises(UsageError, match=r"keep adaptive:0\.5 has no threshold") as caught:
        kept_tokens(Keep(ratio=0.5, adaptive=True), HIGHEST, layers=LAYERS, visual_tokens=10)
    assert "--calibration" in caught.value.hint

"""The selection's text on the host against plain sorting: exact, whatever the ties."""

from __future__ import annotations

import numpy as np
import plugin_reference as reference
import pytest
from numpy.typing import NDArray


def pictures(*sizes: int, gap: int = 3) -> tuple[NDArray[np.int64], int]:
    """visual_index of pictures with `gap` text tokens around each, and the sequence's length."""
    starts = np.cumsum([gap, *[size + gap for size in sizes[:-1]]])
    index = np.concatenate(
        [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    )
    return index.astype(np.int64), int(index[-1]) + 1 + gap


def score_kinds(count: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(count)
    random = rng.standard_normal(count).astype(np.float32)
    holes = random.copy()
    holes[rng.random(count) < 0.3] = np.nan
    holes[rng.random(count) < 0.1] = np.inf
    holes[rng.random(count) < 0.1] = -np.inf
    return {
        "distinct": random,
        "many ties": rng.integers(0, 4, count).astype(np.float32),
        "all equal": np.full(count, 1.5, np.float32),
        "signed zeros": np.where(rng.random(count) < 0.5, np.float32(0.0), np.float32(-0.0)),
        "not finite": holes,
        "nothing finite": np.full(count, np.nan, np.float32),
        "extremes": rng.choice(np.array([3.4e38, -3.4e38, 1e-45, -1e-45, 0], np.float32), count),
        "close together": (np.float32(3.4) + np.float32(2e-7) * rng.integers(0, 9, count)).astype(np.float32),
    }


@pytest.mark.parametrize("select", reference.SELECTS)
@pytest.mark.parametrize("budget", reference.BUDGETS)
@pytest.mark.parametrize("sizes", [(1,), (7,), (576,), (64, 64), (1, 300, 9), (1025,)], ids=str)
def test_kept_positions_match_sorting(host: reference.HostLibrary, sizes, budget: str, select: str):
    index, sequence = pictures(*sizes)
    count = len(index)
    for name, score in score_kinds(count).items():
        for k in sorted({1, (count + 3) // 4, count - 1, count} - {0}):
            expected = reference.kept_index(score, index, sequence, k, select, budget)
            for threads in (256, 1024):
                got, visual = host.select(score, index, sequence, k, select, budget, threads=threads)
                case = f"{name}, k={k}, {threads} threads"
                assert np.array_equal(got, expected), case
                assert np.array_equal(visual, reference.kept_visual_index(expected, index)), case


def test_every_picture_keeps_its_share(host: reference.HostLibrary):
    index, sequence = pictures(100, 200, 700)
    score = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    score[:100] += 100  # joint, the first picture would win everything
    kept, _ = host.select(score, index, sequence, 250, "highest", "per_picture")
    shares = [np.isin(kept, index[part]).sum() for part in (slice(100), slice(100, 300), slice(300, 1000))]
    assert shares == [25, 50, 175]


def test_the_largest_sequence_is_exact(host: reference.HostLibrary):
    index, sequence = pictures(65536)
    score = np.random.default_rng(0).standard_normal(65536).astype(np.float32)
    expected = reference.kept_index(score, index, sequence, 16384, "highest", "joint")
    kept, visual = host.select(score, index, sequence, 16384, "highest", "joint")
    assert np.array_equal(kept, expected)
    assert np.array_equal(visual, reference.kept_visual_index(expected, index))


@pytest.mark.parametrize("select", reference.SELECTS)
def test_a_second_cut_by_the_same_scores_keeps_what_one_deeper_cut_keeps(
    host: reference.HostLibrary, select: str
):
    index, sequence = pictures(300, 20, 256)
    score = np.random.default_rng(5).integers(0, 100, len(index)).astype(np.float32)  # with ties
    score[::17] = np.nan
    first, still_visual = host.select(score, index, sequence, 200, select, "joint")
    score_of = dict(zip(index.tolist(), score, strict=True))
    rest = np.array([score_of[position] for position in first[still_visual].tolist()], np.float32)
    second, last_visual = host.select(rest, still_visual, len(first), 50, select, "joint")
    expected = reference.kept_index(score, index, sequence, 50, select, "joint")
    assert np.array_equal(first[second], expected)
    assert np.array_equal(last_visual, reference.kept_visual_index(expected, index))


def test_a_second_cut_still_tells_pictures_apart(host: reference.HostLibrary):
    index, sequence = pictures(100, 200, 700, gap=1)
    rng = np.random.default_rng(6)
    score = rng.standard_normal(1000).astype(np.float32)
    first, still_visual = host.select(score, index, sequence, 500, "highest", "per_picture")
    rest = rng.standard_normal(500).astype(np.float32)
    rest[:50] += 100  # joint, the first picture would win everything
    second, _ = host.select(rest, still_visual, len(first), 100, "highest", "per_picture")
    kept = first[second]
    shares = [np.isin(kept, index[part]).sum() for part in (slice(100), slice(100, 300), slice(300, 1000))]
    assert shares == [10, 20, 70]


@pytest.mark.parametrize("budget", reference.BUDGETS)
@pytest.mark.parametrize("stray", [-(1 << 40), -1, 79, 1 << 40], ids=str)
def test_an_index_outside_the_sequence_writes_nothing_outside_the_outputs(
    host: reference.HostLibrary, stray: int, budget: str
):
    """`select` looks beside what is written; a stray that stays is a stray for the next cut too."""
    index, sequence = pictures(40, 30)
    assert sequence == 79
    score = np.random.default_rng(7).standard_normal(70).astype(np.float32)
    strays = np.array([0, 33, 69])
    index[strays], score[strays] = stray, np.nan
    for k in (1, 35, 67, 70):
        _, visual = host.select(score, index, sequence, k, "highest", budget)
        rows = sequence - 70 + k
        outside = (visual < 0) | (visual >= rows)
        assert (visual != reference.UNWRITTEN).all()  # every slot is written
        if budget == "joint":
            assert outside.sum() == max(0, k - 67)  # strays rank last


def test_one_visual_token_with_one_slot_stays(host: reference.HostLibrary):
    """Also when its score is not a number."""
    index = np.array([0], np.int64)
    kept, visual = host.select(np.array([np.nan], np.float32), index, 1, 1, "highest", "joint")
    assert (kept.tolist(), visual.tolist()) == ([0], [0])

"""The selection's text on the host against plain sorting: exact, whatever the ties."""

from __future__ import annotations

import numpy as np
import plugin_reference as reference
import pytest
from numpy.typing import NDArray


def pictures(*sizes: int, gap: int = 3) -> tuple[NDArray[np.int64], int]:
    """visual_index of pictures with `gap` text tokens around each, and the prompt's length."""
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
    index, prompt = pictures(*sizes)
    count = len(index)
    for name, score in score_kinds(count).items():
        for k in sorted({1, (count + 3) // 4, count - 1, count} - {0}):
            expected = reference.kept_index(score, index, prompt, k, select, budget)
            for threads in (256, 1024):
                got = host.kept_index(score, index, prompt, k, select, budget, threads=threads)
                assert np.array_equal(got, expected), f"{name}, k={k}, {threads} threads"


def test_every_picture_keeps_its_share(host: reference.HostLibrary):
    index, prompt = pictures(100, 200, 700)
    score = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    score[:100] += 100  # joint, the first picture would win everything
    kept = host.kept_index(score, index, prompt, 250, "highest", "per_picture")
    shares = [np.isin(kept, index[part]).sum() for part in (slice(100), slice(100, 300), slice(300, 1000))]
    assert shares == [25, 50, 175]


def test_the_largest_prompt_is_exact(host: reference.HostLibrary):
    index, prompt = pictures(65536)
    score = np.random.default_rng(0).standard_normal(65536).astype(np.float32)
    expected = reference.kept_index(score, index, prompt, 16384, "highest", "joint")
    assert np.array_equal(host.kept_index(score, index, prompt, 16384, "highest", "joint"), expected)


def test_decoding_passes_through(host: reference.HostLibrary):
    """One position as visual_index and one slot: every token stays, also when its score is not a number."""
    index = np.array([0], np.int64)
    got = host.kept_index(np.array([np.nan], np.float32), index, 1, 1, "highest", "joint")
    assert got.tolist() == [0]

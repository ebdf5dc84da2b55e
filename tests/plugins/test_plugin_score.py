"""The kernel's score text on the host against NumPy float64, for every kind of token hard in float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import plugin_reference as reference
import pytest
from numpy.typing import NDArray

# Nats. The design's bound for two exact scorers; the worst token seen here was 0.7e-6 off.
PAPER_TOLERANCE = 2e-6
# Relative to the scale of the score, see `errors`.
TOLERANCE = {"paper": PAPER_TOLERANCE, "released": 2e-6, "order2": 2e-6, "norm": 1e-6}

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (
    (200, 32, 128),
    (100, 28, 128),
    (200, 8, 32),
    (8, 64, 256),
    (100, 32, 16),
    (100, 3, 5),
)


def gauss(rng: np.random.Generator, *shape: int) -> NDArray[np.float64]:
    return rng.standard_normal(shape)


def low_rank(rank: int, noise: float = 0.0) -> Callable[..., NDArray[np.float64]]:
    def make(rng: np.random.Generator, n: int, h: int, d: int) -> NDArray[np.float64]:
        return gauss(rng, n, h, rank) @ gauss(rng, n, rank, d) + noise * gauss(rng, n, h, d)

    return make


def some_rows_zero(rng: np.random.Generator, n: int, h: int, d: int) -> NDArray[np.float64]:
    x = gauss(rng, n, h, d)
    x[:, ::3] = 0
    return x


def decaying(rng: np.random.Generator, n: int, h: int, d: int) -> NDArray[np.float64]:
    return (gauss(rng, n, h, h) * 10.0 ** -np.linspace(0, 6, h)) @ gauss(rng, n, h, d)


KINDS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "random": gauss,
    "rank 1": low_rank(1),
    "rank 2": low_rank(2),
    "rank 3": low_rank(3),
    "rank 2, noise 1e-2": low_rank(2, 1e-2),
    "rank 2, noise 1e-3": low_rank(2, 1e-3),
    "rank 2, noise 1e-5": low_rank(2, 1e-5),
    "decaying spectrum": decaying,
    "shared mean": lambda rng, n, h, d: 1e3 * gauss(rng, n, 1, d) + gauss(rng, n, h, d),
    "constant over heads": lambda rng, n, h, d: np.broadcast_to(gauss(rng, n, 1, d), (n, h, d)),
    "zero": lambda rng, n, h, d: 0 * gauss(rng, n, h, d),
    "duplicated heads": lambda rng, n, h, d: gauss(rng, n, (h + 1) // 2, d)[:, np.arange(h) // 2],
    "huge": lambda rng, n, h, d: 1e37 * gauss(rng, n, h, d).clip(-3, 3),
    "tiny": lambda rng, n, h, d: 1e-38 * gauss(rng, n, h, d),
    "heads of different scales": lambda rng, n, h, d: (
        gauss(rng, n, h, d) * 10 ** rng.uniform(-3, 3, (n, h, 1))
    ),
    "one dominant head": lambda rng, n, h, d: (
        gauss(rng, n, h, d) * np.where(np.arange(h) == 0, 1e3, 1)[:, None]
    ),
    "some heads zero": some_rows_zero,
}
ROUNDINGS = ("float32", "float16", "bfloat16")


def tokens(kind: str, shape: Shape, rounding: str = "float32") -> NDArray[np.float32]:
    rng = np.random.default_rng([len(kind), *shape, *kind.encode()])
    x = np.asarray(KINDS[kind](rng, *shape), np.float32)
    if rounding == "float16":
        return np.clip(x, -60000, 60000).astype(np.float16).astype(np.float32)
    if rounding == "bfloat16":  # truncation: any bfloat16 value will do
        return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return x


def errors(got: NDArray[np.float32], x: NDArray[np.float32], scorer: str) -> NDArray[np.float64]:
    """Error relative to the score's scale: 1 for paper and order2, whose states are normalised.

    The released score is m (entropy - ln m) / ln H for the mean square m of the rows: two terms of size m
    that can cancel, so its scale is m. A score beyond float32 is float32's largest number.
    """
    limit = float(np.finfo(np.float32).max)
    expected = np.clip(reference.scores(x, scorer), -limit, limit)
    scale = np.ones(len(x))
    if scorer in ("released", "norm"):
        scale = np.maximum(scale, np.abs(expected))
    if scorer == "released":
        rows = x.astype(np.float64)
        rows -= rows.mean(axis=1, keepdims=True)
        scale = np.maximum(scale, (rows * rows).sum(axis=(1, 2)) / x.shape[1])
    return np.abs(got - expected) / scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_match_float64(host: reference.HostLibrary, kind: str, shape: Shape):
    for rounding in ROUNDINGS:
        x = tokens(kind, shape, rounding)
        for scorer in reference.SCORERS:
            for careful in (False, True) if rounding == "float32" else (False,):
                got, _ = host.scores(x, scorer, careful=careful)
                worst = errors(got, x, scorer).max()
                assert worst <= TOLERANCE[scorer], f"{scorer}, {rounding}, careful={careful}: {worst:.2e}"


def test_paper_scores_are_nats_within_the_bound_over_thousands_of_tokens(host: reference.HostLibrary):
    x = np.concatenate([tokens(kind, (150, 32, 128)) for kind in KINDS])
    got, _ = host.scores(x, "paper")
    assert len(x) > 2000
    assert np.abs(got - reference.scores(x, "paper")).max() <= PAPER_TOLERANCE


@pytest.mark.parametrize("scorer", ["paper", "released"])
def test_kept_sets_differ_only_in_near_ties(host: reference.HostLibrary, scorer: str):
    x = np.concatenate([tokens("random", (1500, 32, 128)), tokens("rank 3", (500, 32, 128), "float16")])
    exact = reference.scores(x, scorer)
    got, _ = host.scores(x, scorer)
    for k in (200, 500, 1000, 1900):
        threshold = np.sort(exact)[-k]
        kept = set(np.argsort(-got, kind="stable")[:k])
        swapped = kept ^ set(np.argsort(-exact, kind="stable")[:k])
        near = TOLERANCE[scorer] * max(1.0, abs(threshold))
        assert all(abs(exact[n] - threshold) <= near for n in swapped)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scorer", reference.SCORERS)
def test_tokens_that_are_not_finite_score_nan(host: reference.HostLibrary, scorer: str, bad: float):
    x = tokens("random", (40, 28, 80))
    x[np.arange(40), np.arange(40) % 28, 2 * np.arange(40)] = bad
    x[7] = tokens("random", (1, 28, 80))[0]
    got, care = host.scores(x, scorer)
    assert np.isfinite(got[7])
    assert np.isnan(np.delete(got, 7)).all()
    assert care.sum() == 39


def test_ordinary_tokens_take_one_pass_and_rank_deficient_ones_take_care(host: reference.HostLibrary):
    assert not host.scores(tokens("random", (300, 32, 128)), "paper")[1].any()
    assert not host.scores(tokens("shared mean", (300, 28, 128)), "paper")[1].any()
    assert host.scores(tokens("rank 2", (50, 32, 128)), "paper")[1].all()
    assert host.scores(tokens("random", (50, 32, 16)), "paper")[
        1
    ].all()  # 16 columns cannot fill 31 dimensions


@pytest.mark.parametrize("heads", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("dim", [1, 31, 32, 33, 100, 256])
def test_every_shape_in_range_is_scored(host: reference.HostLibrary, heads: int, dim: int):
    x = tokens("random", (6, heads, dim))
    for scorer in reference.SCORERS:
        got, _ = host.scores(x, scorer)
        assert errors(got, x, scorer).max() <= TOLERANCE[scorer]


def test_paper_scores_ignore_scale_and_rotation(host: reference.HostLibrary):
    x = tokens("random", (100, 32, 64))
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((64, 64)))[0]
    plain, _ = host.scores(x, "paper")
    doubled, _ = host.scores(x * np.float32(2), "paper")
    scaled, care = host.scores(x * np.float32(2.0**40), "paper")
    rotated, _ = host.scores((x @ rotation).astype(np.float32), "paper")
    assert np.array_equal(plain, doubled)
    assert care.all()  # out of the fast path's range
    assert np.abs(plain - scaled).max() <= PAPER_TOLERANCE
    assert np.abs(plain - rotated).max() <= PAPER_TOLERANCE

"""Intervals against textbook values and against what a normal distribution would give."""

from __future__ import annotations

import numpy as np
import pytest

from ep_export.sweep.statistics import MeanInterval, Sampling, wilson


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right, trials, low, high) -> None:
    assert wilson(right, trials) == pytest.approx((low, high), abs=1e-4)


def test_questions_about_one_picture_count_as_far_as_they_are_independent() -> None:
    right = (np.random.default_rng(0).random((200, 1)) < 0.7).astype(float)
    alone = Sampling(np.arange(200)).share(right)
    assert alone.interval == "wilson"
    assert (alone.low, alone.high) == pytest.approx(wilson(int(right.sum()), 200))
    # the same 200 outcomes as 20 pictures whose ten questions all go alike: only 20 independent ones
    together = Sampling(np.repeat(np.arange(20), 10)).share(np.repeat(right[:20], 10, axis=0))
    assert together.high - together.low > 2 * (alone.high - alone.low)
    # ten draws of one thing are one
    drawn = Sampling(np.arange(200)).share(np.repeat(right, 10, axis=1))
    assert drawn.high - drawn.low == pytest.approx(alone.high - alone.low, rel=0.1)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_never_has_an_interval_without_width(value: float, draws: int) -> None:
    alone = Sampling(np.arange(30)).share(np.full((30, draws), value))
    assert (alone.low, alone.high) == wilson(int(30 * value), 30)
    together = Sampling(np.repeat(np.arange(6), 5)).share(np.full((30, draws), value))
    assert (together.low, together.high) == wilson(int(6 * value), 6)  # six pictures, not thirty


def test_a_difference_is_never_beyond_doubt_because_nothing_differed() -> None:
    sampling = Sampling(np.arange(100))
    same = sampling.difference(np.zeros((100, 1)))
    assert same.low < 0 == same.value < same.high
    assert same.side == 0
    assert same.high < 0.06  # a hundred pictures do say something
    # against the interval of Agresti and Min for 2 and 12 of 100 discordant pairs: 0.0261 to 0.1700
    pairs = np.concatenate([np.full(12, 1.0), np.full(2, -1.0), np.zeros(86)])[:, None]
    apart = sampling.difference(pairs)
    assert (apart.low, apart.high) == pytest.approx((0.0261, 0.1700), abs=0.015)
    assert apart.side == 1


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(size=(400, 1))
    mean = Sampling(np.arange(400)).mean(values)
    half = 1.96 * values.std() / 20
    assert mean.value == pytest.approx(values.mean())
    assert mean.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert mean.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_a_seed_that_does_better_everywhere_widens_the_interval() -> None:
    """What differs from draw to draw is uncertainty too, not only what differs from picture to picture."""
    sampling = Sampling(np.arange(300))
    picture = np.random.default_rng(2).normal(size=(300, 1))
    alike = sampling.mean(picture + np.zeros(4))
    apart = sampling.mean(picture + np.array([-1.0, -0.5, 0.5, 1.0]))
    assert apart.value == pytest.approx(alike.value)
    assert apart.high - apart.low > 3 * (alike.high - alike.low)


def test_paired_differences_are_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(scale=5, size=(100, 1))  # how hard a question is moves both ways of pruning alike
    one, other = hard + rng.normal(size=(100, 1)), hard + 1 + rng.normal(size=(100, 1))
    sampling = Sampling(np.arange(100))
    assert sampling.mean(one).high > sampling.mean(other).low  # the two intervals overlap
    assert sampling.mean(other - one).low > 0.5  # and yet the difference is beyond doubt


def test_a_mean_is_on_a_side_only_where_its_interval_leaves_out_zero() -> None:
    sides = [MeanInterval(value, value - 0.1, value + 0.1, "bootstrap").side for value in (0.3, -0.3, 0.05)]
    assert sides == [1, -1, 0]
    assert str(MeanInterval(0.5, 0.4, 0.625, "wilson")) == "50.0% [40.0%, 62.5%]"

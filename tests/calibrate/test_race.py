"""The race on made-up pictures: who runs how far, and that the best arrives."""

from __future__ import annotations

import numpy as np

from ep_export.calibrate.race import FIRST_LEG, Leg, is_floor, legs, race
from ep_export.measure.ways import Way, one_cut
from ep_export.policy import Keep

HALF = Keep(ratio=0.5)
WAYS = tuple(one_cut(layer, name, HALF) for layer in (1, 2, 3) for name in (*map(str, range(32)), "random"))


class Pictures:
    """KL of every way on every picture, and what was asked for."""

    def __init__(self, means: np.ndarray, images: int, *, spread: float, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kl = means * rng.uniform(0.5, 1.5, (images, 1)) * rng.lognormal(0, spread, (images, len(means)))
        self.asked: list[tuple[int, range]] = []

    def measure(self, ways: list[Way], part: range) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((len(ways), part))
        kl = self.kl[np.ix_(part, [WAYS.index(way) for way in ways])]
        return kl, 1 - kl


def test_legs_double_the_pictures_and_halve_the_ways() -> None:
    assert legs(48, 56) == (Leg(12, 56), Leg(24, 28), Leg(48, 24))
    assert legs(100, 100) == (Leg(12, 100), Leg(24, 50), Leg(48, 25), Leg(100, 24))
    assert legs(FIRST_LEG, 56) == (Leg(FIRST_LEG, 56),)
    assert legs(500, 5) == (Leg(500, 5),)


def test_every_picture_is_measured_once_and_the_table_is_what_was_measured() -> None:
    pictures = Pictures(np.linspace(0.5, 1.5, len(WAYS)), 48, spread=0.2)
    result = race(WAYS, 48, pictures.measure)
    assert [part for _, part in pictures.asked] == [range(12), range(12, 24), range(24, 48)]
    assert [count for count, _ in pictures.asked] == sorted((c for c, _ in pictures.asked), reverse=True)
    known = np.isfinite(result.kl)
    assert (result.kl[known] == pictures.kl[known]).all()
    for column, images in enumerate(result.images):  # the first so many rows, no holes
        assert known[:images, column].all()
        assert not known[images:, column].any()


def test_the_best_arrives_in_nearly_every_race_though_pictures_differ_much() -> None:
    means = np.full(len(WAYS), 1.0)
    means[4] = 0.5
    arrived = [
        4 in race(WAYS, 48, Pictures(means, 48, spread=1.0, seed=seed).measure, seed=seed).finalists
        for seed in range(20)
    ]
    assert sum(arrived) >= 18


def test_a_race_costs_a_fraction_of_measuring_everything() -> None:
    pictures = Pictures(np.linspace(0.5, 1.5, len(WAYS)), 96, spread=0.5)
    race(WAYS, 96, pictures.measure)
    assert sum(count * len(part) for count, part in pictures.asked) < 0.5 * 96 * len(WAYS)


def test_floors_run_as_long_as_a_way_at_their_layer() -> None:
    means = np.full(len(WAYS), 1.0)
    means[:32] = 0.1  # layer 1
    result = race(WAYS, 48, Pictures(means, 48, spread=0.1).measure)
    ran = {WAYS[i].cuts[0].layer for i in result.finalists if is_floor(WAYS[i])}
    assert ran == {1}
    assert result.images[next(i for i, w in enumerate(WAYS) if is_floor(w) and w.cuts[0].layer == 3)] == 12


def test_what_is_behind_by_less_than_noise_is_not_dropped_for_being_surely_worse() -> None:
    """All within a hundredth of a nat: only halving leaves anything out."""
    pictures = Pictures(np.linspace(0.001, 0.005, len(WAYS)), 48, spread=0.01)
    race(WAYS, 48, pictures.measure)
    assert [count for count, _ in pictures.asked] == [99, 48 + 2, 24 + 1]


def test_one_that_looks_sure_on_the_easy_pictures_does_not_run_alone() -> None:
    """One way loses nothing on the first 24 pictures and much on the others: the next best are there."""

    def measure(ways: list[Way], part: range) -> tuple[np.ndarray, np.ndarray]:
        kl = np.array([[0.5 + 0.01 * WAYS.index(way) for way in ways] for _ in part])
        if WAYS[4] in ways:
            kl[:, list(ways).index(WAYS[4])] = [0.0 if picture < 24 else 5.0 for picture in part]
        return kl, 1 - kl

    result = race(WAYS, 48, measure)
    assert len([i for i in result.finalists if not is_floor(WAYS[i])]) == 24
    assert {4, 0} <= set(result.finalists)

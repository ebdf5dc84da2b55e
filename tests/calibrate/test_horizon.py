"""The information horizon on curves that are known, and what is said where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from ep_export.calibrate.horizon import MIN_IMAGES, NOISE_KL, before_horizon, find_horizon, horizon_ways
from ep_export.policy import Cut, MaxMin, Nothing, Random, Schedule

LAYERS = 12


def measured(means: list[float], *, images: int = 40, noise: float = 0.1, seed: int = 0):
    """KL by layer 1 to 11, each picture with its own difficulty; the top token follows the KL."""
    rng = np.random.default_rng(seed)
    kl = (
        np.array(means)
        * rng.uniform(0.5, 1.5, (images, 1))
        * (1 + rng.normal(0, noise, (images, len(means))))
    )
    return kl, np.where(np.array(means) > NOISE_KL, 0.9, 1.0) * np.ones_like(kl)


def horizon(half: list[float], everything: list[float], **change):
    ways = horizon_ways(LAYERS)
    return find_horizon((ways[0], *measured(half, **change)), (ways[1], *measured(everything, **change)))


FALLING = [1.0, 0.8, 0.5, 0.3, 0.1, 0.05, 0.002, 0.002, 0.001, 0.0, 0.0]
LATER = [3.0, 2.0, 1.0, 0.9, 0.5, 0.4, 0.2, 0.1, 0.002, 0.001, 0.0]


def test_it_is_the_first_layer_from_which_on_all_are_within_noise() -> None:
    result = horizon(FALLING, LATER)
    assert (result.half.horizon, result.everything.horizon, result.layer) == (7, 9, 7)
    assert "at random from layer 7 on, or all of them from layer 9 on, stays within" in result.finding
    assert result.half.layers == tuple(range(1, 12))
    assert result.half.kl[6] < result.half.kl_high[6] < NOISE_KL


def test_one_layer_without_cost_before_others_that_have_some_is_no_horizon() -> None:
    gap = [1.0, 0.0, 0.0, 0.5, 0.3, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert horizon(gap, LATER).half.horizon == 7


def test_tokens_that_still_tip_the_answer_are_before_the_horizon() -> None:
    half, everything = horizon_ways(LAYERS)
    kl, top1 = measured(FALLING)
    top1[:, 6:8] = 0.95
    assert find_horizon((half, kl, top1), (everything, *measured(LATER))).half.horizon == 9


def test_few_pictures_have_no_horizon_and_say_how_many_are_needed() -> None:
    result = horizon(FALLING, LATER, images=MIN_IMAGES - 1)
    assert result.layer is None
    assert result.finding == f"no information horizon: 7 pictures are too few, {MIN_IMAGES} are needed"


def test_a_horizon_that_is_likely_but_not_sure_names_the_pictures_it_takes() -> None:
    rng = np.random.default_rng(0)
    half, everything = horizon_ways(LAYERS)
    kl, top1 = measured(FALLING)
    kl[:, 6] = rng.permutation([0.16, *[0.0] * 39])  # mean 0.004, all of it one picture's
    result = find_horizon((half, kl, top1), (everything, *measured(LATER)))
    assert result.half.horizon == 8
    width = (result.half.kl_high[6] - 0.004) / (NOISE_KL - 0.004)
    assert f"perhaps layer 7 with about {int(np.ceil(40 * width**2))} pictures" in result.finding
    assert width > 1


def test_a_model_that_looks_to_the_last_layer_has_none() -> None:
    result = horizon([0.5] * 11, [1.0] * 11)
    assert result.layer is None
    assert "even before the last layer" in result.finding


@pytest.mark.parametrize("layers", [2, 3, 16, 17, 28, 64])
def test_deep_models_are_looked_at_in_steps_that_end_before_the_last_layer(layers: int) -> None:
    half, everything = horizon_ways(layers)
    at = [way.cuts[0].layer for way in half]
    assert at == [way.cuts[0].layer for way in everything] == sorted(at)
    assert at[-1] == layers - 1
    assert at[0] >= 1
    assert len(at) <= 16
    for way, drop in zip(half, everything, strict=True):
        layer = way.cuts[0].layer
        assert way.kept(layers=layers, visual_tokens=100) == (50,)
        assert drop.kept(layers=layers, visual_tokens=100) == (0,), layer


def test_a_second_cut_before_the_horizon_is_warned_of_with_the_number() -> None:
    result = horizon(FALLING, LATER)
    early = Schedule((Cut(1, MaxMin(), 0.5), Cut(4, Nothing())))
    said = before_horizon(result, early)
    cost = f"dropping all tokens there costs KL {result.everything.kl[3]:.2g}"
    assert said == f"the cut at layer 4 ({cost}) lies before the information horizon, layer 7"
    late = Schedule((Cut(1, MaxMin(), 0.5), Cut(7, Random(), 0.1)))
    assert before_horizon(result, late) is None
    assert before_horizon(result, Schedule((Cut(1, MaxMin()),))) is None
    assert before_horizon(None, early) is None
    assert before_horizon(horizon([0.5] * 11, [1.0] * 11), early) is None

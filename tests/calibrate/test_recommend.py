from __future__ import annotations

import numpy as np
import pytest

from ep_export.calibrate.candidates import ways
from ep_export.calibrate.recommend import Fidelity, recommend, table
from ep_export.calibrate.record import RANDOM
from ep_export.policy import Policy, Scorer, Select


def fidelity(
    means: dict[tuple[int, str, str], float], *, images: int = 24, noise: float = 0.1, seed: int = 0
) -> Fidelity:
    """Every way at layers 1 and 2 has mean KL 1 but for those named, each picture with its own difficulty."""
    all_ways = ways([1, 2])
    rng = np.random.default_rng(seed)
    mean = [
        means.get((way.layer, way.scorer, way.select.value if way.select else "-"), 1.0) for way in all_ways
    ]
    difficulty = rng.uniform(0.5, 1.5, (images, 1))
    kl = np.array(mean) * difficulty * (1 + rng.normal(0, noise, (images, len(all_ways))))
    return Fidelity(all_ways, kl, np.full_like(kl, 0.9))


def test_clear_winner_is_recommended_with_its_direction() -> None:
    found = recommend(fidelity({(2, "norm", "lowest"): 0.3}))
    assert found.policy == Policy(2, Scorer.NORM, Select.LOWEST)
    assert found.confidence == 1.0
    assert "norm lowest at layer 2" in found.reason


def test_nothing_is_recommended_when_nothing_beats_random() -> None:
    found = recommend(fidelity({}))
    assert found.policy is None
    assert found.confidence is None
    assert "no policy beats random" in found.reason


def test_useless_ways_hardly_ever_pass_for_good_ones() -> None:
    passed = [recommend(fidelity({}, noise=0.3, seed=seed)).policy is not None for seed in range(30)]
    assert sum(passed) <= 3


def test_way_that_beats_its_own_floor_but_not_random_at_another_layer_is_not_recommended() -> None:
    found = recommend(fidelity({(2, "paper", "highest"): 0.8, (1, RANDOM, "-"): 0.4}))
    assert found.policy is None


def test_published_policy_is_preferred_among_equals_only() -> None:
    equal = {(1, "norm", "highest"): 0.400, (2, "paper", "highest"): 0.401}
    assert recommend(fidelity(equal)).policy == Policy(2, Scorer.PAPER, Select.HIGHEST)
    worse = {(1, "norm", "highest"): 0.4, (2, "paper", "highest"): 0.6}
    assert recommend(fidelity(worse)).policy == Policy(1, Scorer.NORM, Select.HIGHEST)


def test_few_pictures_do_not_make_a_much_worse_way_equal() -> None:
    vague = fidelity({(1, "norm", "highest"): 0.2, (2, "paper", "highest"): 0.3}, images=5, noise=0.02)
    vague.kl[
        0, [way.scorer == "norm" and way.layer == 1 and way.select is Select.HIGHEST for way in vague.ways]
    ] *= 2
    assert recommend(vague).policy == Policy(1, Scorer.NORM, Select.HIGHEST)


def test_earlier_layer_is_preferred_among_equals() -> None:
    equal = {(1, "norm", "highest"): 0.401, (2, "norm", "highest"): 0.400}
    assert recommend(fidelity(equal)).policy == Policy(1, Scorer.NORM, Select.HIGHEST)


def test_few_pictures_recommend_nothing() -> None:
    found = recommend(fidelity({(2, "norm", "lowest"): 0.1}, images=3))
    assert found.policy is None
    assert "3 pictures are too few" in found.reason


def test_table_has_means_and_intervals_around_them() -> None:
    data = fidelity({(2, "norm", "lowest"): 0.3})
    rows = table(data, keep=0.25)
    assert len(rows) == len(data.ways) == 18
    for column, row in enumerate(rows):
        assert row.kl == pytest.approx(data.kl[:, column].mean())
        assert row.kl_low < row.kl < row.kl_high
        # the bootstrap of a mean is about normal: 1.96 standard errors each way
        error = data.kl[:, column].std() / np.sqrt(len(data.kl))
        assert row.kl_high - row.kl_low == pytest.approx(3.92 * error, rel=0.15)
        assert row.keep == 0.25

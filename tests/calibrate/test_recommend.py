from __future__ import annotations

import numpy as np
import pytest

from ep_export.calibrate.candidates import candidate_layers, candidate_ways
from ep_export.calibrate.recommend import Fidelity, recommend, table
from ep_export.calibrate.record import RANDOM
from ep_export.errors import UsageError
from ep_export.policy import Cut, Keep, MaxMin, Schedule, Scorer, Select, TopK

HALF = Keep(ratio=0.5)


def schedule(layer: int, chooser) -> Schedule:
    return Schedule((Cut(layer, chooser),))


def fidelity(
    means: dict[tuple[int, str], float], *, images: int = 24, noise: float = 0.1, seed: int = 0
) -> Fidelity:
    """Every cut at layers 0 to 2 has mean KL 1 but for those named, each picture with its own difficulty."""
    ways = candidate_ways([0, 1, 2], HALF)
    rng = np.random.default_rng(seed)
    mean = [means.get((way.cuts[0].layer, way.cuts[0].method), 1.0) for way in ways]
    difficulty = rng.uniform(0.5, 1.5, (images, 1))
    kl = np.array(mean) * difficulty * (1 + rng.normal(0, noise, (images, len(ways))))
    return Fidelity(ways, kl, np.full_like(kl, 0.9))


def test_every_chooser_is_a_candidate_where_it_can_choose() -> None:
    names = [(way.cuts[0].layer, way.cuts[0].method) for way in candidate_ways([0, 3], HALF)]
    scored = [f"{scorer.value}-{select.value}" for scorer in Scorer for select in Select]
    assert [name for layer, name in names if layer == 0] == ["divprune", "random"]
    assert [name for layer, name in names if layer == 3] == [*scored, "divprune", "random"]
    assert all(way.keep == HALF for way in candidate_ways([0, 3], HALF))


def test_candidate_layers_are_those_that_the_keep_allows() -> None:
    assert candidate_layers(HALF, 6) == (0, 1, 2, 3)
    assert candidate_layers(HALF, 6, [5, 2]) == (2,)
    assert candidate_layers(Keep(tokens=3), 6, [5, 2]) == (2, 5)  # it depends on the picture
    with pytest.raises(UsageError, match="below the smallest possible"):
        candidate_layers(HALF, 6, [4, 5])
    with pytest.raises(UsageError, match="expected 0 to 5"):
        candidate_layers(HALF, 6, [6])


def test_clear_winner_is_recommended_with_its_direction() -> None:
    advice = recommend(fidelity({(2, "norm-lowest"): 0.3}))
    assert advice.schedule == schedule(2, TopK(Scorer.NORM, Select.LOWEST))
    assert advice.confidence == 1.0
    assert "norm-lowest at layer 2" in advice.reason


def test_nothing_is_recommended_when_nothing_beats_random() -> None:
    advice = recommend(fidelity({}))
    assert advice.schedule is None
    assert advice.confidence is None
    assert "no policy beats random" in advice.reason


def test_useless_ways_hardly_ever_pass_for_good_ones() -> None:
    passed = [recommend(fidelity({}, noise=0.3, seed=seed)).schedule is not None for seed in range(30)]
    assert sum(passed) <= 3


def test_way_that_beats_its_own_floor_but_not_random_at_another_layer_is_not_recommended() -> None:
    advice = recommend(fidelity({(2, "paper-highest"): 0.8, (1, RANDOM): 0.4}))
    assert advice.schedule is None


def test_divprune_can_be_recommended_before_and_inside_the_decoder() -> None:
    inside = recommend(fidelity({(2, "divprune"): 0.3, (2, "norm-lowest"): 0.6}))
    assert inside.schedule == schedule(2, MaxMin())
    assert "divprune at layer 2" in inside.reason
    before = recommend(fidelity({(0, "divprune"): 0.3, (2, "norm-lowest"): 0.6}))
    assert before.schedule == schedule(0, MaxMin())


def test_published_policy_is_preferred_among_equals_only() -> None:
    equal = {(1, "norm-highest"): 0.400, (2, "paper-highest"): 0.401}
    assert recommend(fidelity(equal)).schedule == schedule(2, TopK(Scorer.PAPER, Select.HIGHEST))
    worse = {(1, "norm-highest"): 0.4, (2, "paper-highest"): 0.6}
    assert recommend(fidelity(worse)).schedule == schedule(1, TopK(Scorer.NORM, Select.HIGHEST))


def test_few_pictures_do_not_make_a_much_worse_way_equal() -> None:
    vague = fidelity({(1, "norm-highest"): 0.2, (2, "paper-highest"): 0.3}, images=5, noise=0.02)
    vague.kl[0, [(cut.layer, cut.method) == (1, "norm-highest") for cut in vague.cuts]] *= 2
    assert recommend(vague).schedule == schedule(1, TopK(Scorer.NORM, Select.HIGHEST))


def test_earlier_layer_is_preferred_among_equals() -> None:
    equal = {(1, "norm-highest"): 0.401, (2, "norm-highest"): 0.400}
    assert recommend(fidelity(equal)).schedule == schedule(1, TopK(Scorer.NORM, Select.HIGHEST))


def test_few_pictures_recommend_nothing() -> None:
    advice = recommend(fidelity({(2, "norm-lowest"): 0.1}, images=3))
    assert advice.schedule is None
    assert "3 pictures are too few" in advice.reason


def test_table_has_means_and_intervals_around_them() -> None:
    data = fidelity({(2, "norm-lowest"): 0.3})
    rows = table(data, keep=0.25)
    assert len(rows) == len(data.ways) == 22
    for column, row in enumerate(rows):
        assert row.kl == pytest.approx(data.kl[:, column].mean())
        assert row.kl_low < row.kl < row.kl_high
        # the bootstrap of a mean is about normal: 1.96 standard errors each way
        error = data.kl[:, column].std() / np.sqrt(len(data.kl))
        assert row.kl_high - row.kl_low == pytest.approx(3.92 * error, rel=0.15)
        assert row.keep == 0.25

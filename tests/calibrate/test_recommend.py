from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ep_export.calibrate.candidates import candidate_layers, candidate_ways, two_cut_ways
from ep_export.calibrate.horizon import DropCurve, Horizon
from ep_export.calibrate.race import Fidelity, is_floor
from ep_export.calibrate.recommend import recommend, table
from ep_export.calibrate.record import RANDOM
from ep_export.errors import UsageError
from ep_export.planning import average_keep, check_schedule
from ep_export.policy import (
    Coverage,
    Cut,
    Keep,
    MaxMin,
    Nothing,
    Random,
    Schedule,
    Scorer,
    Select,
    Source,
    TopK,
    reads_projections,
)

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
    ways = candidate_ways([0, 3], HALF)
    names = [(way.cuts[0].layer, way.cuts[0].method) for way in ways]
    deep = {name for layer, name in names if layer == 3}
    assert {TopK(scorer, select).name for scorer in Scorer for select in Select} < deep
    assert {"divprune", "random", Coverage(Scorer.NORM, Select.LOWEST).name} < deep
    attention = TopK(Scorer.NORM, source=Source.ATTENTION)
    assert attention.name not in deep
    asked = candidate_ways([3], HALF, [attention, MaxMin()])
    assert {way.cuts[0].method for way in asked} == deep | {attention.name}
    assert len(asked) == len(deep) + 1
    early = {way.schedule.cuts[0].chooser for way in ways if way.cuts[0].layer == 0}
    assert {MaxMin(), Random()} <= early
    assert not any(map(reads_projections, early))
    assert all(way.keep == HALF for way in ways)


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
    vague.kl[0, [(w.cuts[0].layer, w.cuts[0].method) == (1, "norm-highest") for w in vague.ways]] *= 2
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
    assert len(rows) == len(data.ways)
    for column, row in enumerate(rows):
        assert row.kl == pytest.approx(data.kl[:, column].mean())
        assert row.kl_low < row.kl < row.kl_high
        # the bootstrap of a mean is about normal: 1.96 standard errors each way
        error = data.kl[:, column].std() / np.sqrt(len(data.kl))
        assert row.kl_high - row.kl_low == pytest.approx(3.92 * error, rel=0.15)
        assert row.keep == 0.25


def horizon(half: int | None, everything: int | None) -> Horizon:
    return Horizon(
        20, DropCurve((), (), (), (), half), DropCurve((), (), (), (), everything), "as it was told"
    )


@pytest.mark.parametrize("keep", [Keep(ratio=0.5), Keep(ratio=0.25)])
def test_two_cut_schedules_have_the_same_average_and_drop_without_looking_at_the_horizon(keep: Keep) -> None:
    single = candidate_ways([0, 1, 2], keep)
    ways = two_cut_ways(single, horizon(8, 10), layers=12)
    seconds = {(cut.layer, cut.method) for way in ways for cut in way.cuts[1:]}
    assert seconds == {(8, "nothing"), (10, "nothing"), (8, "random")}
    assert {way.cuts[0].method for way in ways} == {w.cuts[0].method for w in single if not is_floor(w)}
    for way in ways:
        check_schedule(way.schedule, 12)
        first, second = way.schedule.cuts
        shares = (first.share, 0 if second.chooser == Nothing() else second.share)
        average = first.layer + shares[0] * (second.layer - first.layer) + shares[1] * (12 - second.layer)
        assert average / 12 == pytest.approx(keep.ratio, abs=1e-6)
        assert way.fits(layers=12, visual_tokens=50)


def test_without_a_horizon_there_is_no_second_cut() -> None:
    assert two_cut_ways(candidate_ways([0, 1], HALF), horizon(None, None), layers=12) == ()
    only = two_cut_ways(candidate_ways([1], HALF), horizon(None, 9), layers=12)
    assert {(cut.layer, cut.method) for way in only for cut in way.cuts[1:]} == {(9, "nothing")}


def test_random_second_cuts_keep_an_average_too() -> None:
    ways = two_cut_ways(candidate_ways([0], HALF), horizon(8, None), layers=12)
    drawn = next(way for way in ways if way.cuts[1].method == RANDOM)
    assert average_keep(drawn.schedule, layers=12).ratio == pytest.approx(0.5, abs=1e-6)


def test_among_equals_a_second_cut_is_added_to_the_leader_s_own_chooser_not_to_another() -> None:
    single = candidate_ways([1], HALF)
    ways = (*single, *two_cut_ways(single, horizon(None, 3), layers=4))
    mean = np.ones(len(ways))
    for key, value in (("norm-lowest", 0.300), ("divprune", 0.301)):
        mean[[way.cuts[0].method == key for way in ways]] = value
    mean[[way.cuts[0].method == "norm-lowest" and len(way.cuts) == 2 for way in ways]] = 0.302
    kl = mean * np.random.default_rng(0).uniform(0.5, 1.5, (24, 1))
    kl = kl * (1 + np.random.default_rng(1).normal(0, 0.1, kl.shape))
    kl *= mean / kl.mean(axis=0)
    advice = recommend(Fidelity(ways, kl, np.full_like(kl, 0.9)))
    assert [cut.chooser for cut in advice.schedule.cuts] == [TopK(Scorer.NORM, Select.LOWEST), Nothing()]


def test_two_cuts_are_recommended_where_they_are_as_good_and_only_there() -> None:
    single = candidate_ways([0, 1], HALF)
    ways = (*single, *two_cut_ways(single, horizon(3, None), layers=4))
    rng = np.random.default_rng(0)

    def advice(two: float):
        chosen = next(i for i, way in enumerate(ways) if way.key.startswith("0:") and "nothing" in way.key)
        mean = np.ones(len(ways))
        mean[chosen], mean[0] = two, 0.3
        kl = mean * rng.uniform(0.5, 1.5, (24, 1)) * (1 + rng.normal(0, 0.05, (24, len(ways))))
        return recommend(Fidelity(ways, kl, np.full_like(kl, 0.9)))

    assert advice(0.2).schedule.cuts[1] == Cut(3, Nothing())
    assert "then nothing at layer 3" in advice(0.2).reason
    assert len(advice(0.301).schedule.cuts) == 2  # equal: more tokens go through the layers that look
    assert len(advice(0.4).schedule.cuts) == 1


class TestSeparation:
    """How sure the first is, and what it would take."""

    best = schedule(2, TopK(Scorer.NORM, Select.LOWEST))

    def close_rival(self, mean: float, spread: float) -> tuple[Fidelity, np.ndarray]:
        """A rival that is so much worse than the best on average, picture by picture otherwise."""
        data = fidelity({(2, "norm-lowest"): 0.3})
        first = next(i for i, w in enumerate(data.ways) if w.key.startswith("2:norm-lowest"))
        rival = next(i for i, w in enumerate(data.ways) if w.key.startswith("1:divprune"))
        difference = np.random.default_rng(1).normal(0, spread, len(data.kl))
        difference += mean - difference.mean()
        data.kl[:, rival] = data.kl[:, first] + difference
        return data, difference

    def test_a_clear_first_needs_no_more_pictures(self) -> None:
        advice = recommend(fidelity({(2, "norm-lowest"): 0.3, (1, "divprune"): 0.8}))
        assert advice.images_needed is None
        assert "all others are worse for sure" in advice.reason

    def test_a_vague_first_says_how_many_would_tell(self) -> None:
        data, difference = self.close_rival(0.04, 0.2)
        advice = recommend(data)
        expected = (1.96 * difference.std(ddof=1) / 0.04) ** 2
        assert advice.schedule == self.best
        assert advice.images_needed == pytest.approx(expected, abs=1)
        assert f"may be as good, more pictures needed: about {advice.images_needed}" in advice.reason

    def test_a_difference_below_the_noise_needs_none(self) -> None:
        data, _ = self.close_rival(0.04, 0.2)
        advice = recommend(replace(data, kl=0.05 * data.kl))
        assert advice.images_needed is None
        assert "1 within 0.01 nats of it for sure, which hardly matters" in advice.reason

    def test_a_small_mean_difference_that_may_hide_a_large_one_needs_more(self) -> None:
        data, difference = self.close_rival(0.005, 0.3)
        advice = recommend(data)
        expected = (1.96 * difference.std(ddof=1) / 0.01) ** 2  # until the interval lies within the noise
        assert advice.images_needed == pytest.approx(expected, rel=0.01)


def test_a_way_that_fell_out_of_the_race_is_in_the_table_but_not_recommended() -> None:
    data = fidelity({(2, "norm-lowest"): 0.3, (1, "divprune"): 0.1})
    lost = next(i for i, w in enumerate(data.ways) if w.key.startswith("1:divprune"))
    data.kl[12:, lost] = data.agreement[12:, lost] = np.nan
    assert recommend(data).schedule == schedule(2, TopK(Scorer.NORM, Select.LOWEST))
    row = table(data, keep=0.5)[lost]
    assert row.images == 12
    assert row.kl == pytest.approx(data.kl[:12, lost].mean())

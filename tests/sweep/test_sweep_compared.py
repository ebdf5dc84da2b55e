"""Which combinations are compared: possible ones, each once, with what makes them comparable."""

from __future__ import annotations

import numpy as np
import pytest

from ep_export.adaptive import fit_threshold
from ep_export.errors import UsageError
from ep_export.measure.ways import Scaling, one_cut
from ep_export.methods import METHODS, Place, find_methods
from ep_export.policy import Cut, Keep, MaxMin, Random, Schedule, Scorer, Select, TopK
from ep_export.sweep.compared import auto_layers, compared_ways

FASTV = find_methods(("fastv",))
PLACED = tuple(method for method in METHODS if method.place in {Place.INSIDE, Place.ANYWHERE})


def places(rows) -> list[tuple[int, float]]:
    return list(dict.fromkeys((row.layer, row.keep) for row in rows))


@pytest.mark.parametrize(
    ("keep", "layers", "expected"),
    [
        (0.5, 12, (1, 3, 4)),  # layer 5 leaves (6 - 5) / 7 = 0.14, below a third of 0.5
        (0.25, 12, (1, 2)),  # layer 2 leaves 0.1, layer 3 nothing
        (0.125, 12, (1,)),
        (1 / 12, 12, (1,)),  # layer 1 uses it all up, and is all there is
        (0.5, 28, (1, 6, 11)),  # spread over the eleven possible ones
    ],
)
def test_layers_tried_by_default(keep: float, layers: int, expected) -> None:
    assert auto_layers(keep, layers) == expected


def test_an_impossible_keep_names_the_smallest() -> None:
    with pytest.raises(UsageError, match="below the smallest possible"):
        auto_layers(0.05, 12)


def test_impossible_combinations_are_noted_and_the_rest_goes_on() -> None:
    rows, notes = compared_ways([0.5, 0.25], 12, [2, 5], FASTV)
    assert places(rows) == [(2, 0.5), (5, 0.5), (2, 0.25)]
    assert len(notes) == 1
    assert "keep 0.25 at layer 5" in notes[0]
    with pytest.raises(UsageError, match="impossible at every layer"):
        compared_ways([0.25], 12, [5], METHODS)
    with pytest.raises(UsageError, match="expected 0 to 11"):
        compared_ways([0.5], 12, [12], METHODS)


def test_methods_stand_where_they_can_prune() -> None:
    rows, _ = compared_ways([0.5], 12, [1], METHODS)
    keys = {layer: [row.method for row in rows if row.layer == layer] for layer in (0, 1)}
    placed = [method.key for method in PLACED]
    assert [key for key in keys[0] if key in placed] == ["divprune", "cdpruner", "visionzip", "random"]
    assert [key for key in keys[1] if key in placed] == placed
    assert {*keys[0], *keys[1]} >= {"horizon", "sparsevlm", "scaled", "scaled-flops"}
    assert places(rows) == [(0, 0.5), (1, 0.5), (3, 0.5)]  # PyramidDrop begins at a quarter of the depth
    assert [row.method for row in rows if row.layer == 3] == ["pyramiddrop"]
    assert next(row for row in rows if row.layer == 1 and row.method == "random").way == one_cut(
        1, "random", Keep(ratio=0.5)
    )


def test_what_is_recommended_competes_at_its_own_layer() -> None:
    norm = TopK(Scorer.NORM, Select.LOWEST)
    rows, _ = compared_ways([0.5], 12, [1], PLACED, recommended={0.5: Schedule((Cut(3, norm),))})
    assert places(rows) == [(0, 0.5), (1, 0.5), (3, 0.5)]
    at_three = {row.method: row.way for row in rows if row.layer == 3}
    assert list(at_three) == [*(method.key for method in PLACED), "recommended"]
    assert at_three["recommended"] == at_three["norm-lowest"]  # one way, measured once


def test_a_schedule_competes_at_every_keep_with_all_methods_at_its_first_layer() -> None:
    schedule = Schedule((Cut(2, MaxMin(), 0.5), Cut(6, Random(), 0.25)))
    rows, _ = compared_ways([0.5, 0.25], 12, [1], find_methods(("norm-lowest", "random")), schedule=schedule)
    own = [row for row in rows if row.method == "schedule"]
    assert [(row.layer, row.keep) for row in own] == [(2, 0.5), (2, 0.25)]
    for row in own:
        assert row.way.schedule == schedule
        first, second = row.way.kept(layers=12, visual_tokens=1200)
        assert 2 * 1200 + 4 * first + 6 * second == pytest.approx(12 * 1200 * row.keep, abs=12)
        assert first == pytest.approx(2 * second, abs=2)  # shares are scaled, not replaced
    assert {(1, 0.5), (2, 0.5), (1, 0.25), (2, 0.25)} == set(places(rows))


def test_a_schedule_that_a_keep_rules_out_is_noted() -> None:
    schedule = Schedule((Cut(5, MaxMin(), 0.5), Cut(6, Random(), 0.25)))
    rows, notes = compared_ways([0.25], 12, [1], FASTV, schedule=schedule)
    assert places(rows) == [(1, 0.25)]
    assert "keep 0.25 at layer 5" in notes[0]


def test_an_adaptive_keep_competes_beside_the_fixed_one() -> None:
    schedule = Schedule((Cut(2, MaxMin()),))
    own = fit_threshold(0.5, schedule, [np.linspace(0, 1, 40)], layers=12)
    rows, _ = compared_ways(
        [0.5], 12, [1], FASTV, recommended={0.5: schedule}, adaptive={0.5: (schedule, own)}
    )
    ways = {row.method: row.way for row in rows if row.layer == 2}
    assert ways["adaptive"].cuts == ways["recommended"].cuts
    assert ways["adaptive"].keep == own
    assert ways["adaptive"].key != ways["recommended"].key


def test_a_smaller_picture_is_compared_at_both_budgets() -> None:
    rows, _ = compared_ways([0.5], 12, [1], find_methods(("scaled", "scaled-flops", "random")))
    ways = {row.method: row.way for row in rows if not row.way.cuts}
    assert {method: way.scaling for method, way in ways.items()} == {
        "scaled": Scaling.TOKENS,
        "scaled-flops": Scaling.FLOPS,
    }
    assert [row.layer for row in rows if not row.way.cuts] == [0, 0]

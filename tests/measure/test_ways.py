"""Ways are data: their names, and budgets that are those of the plan."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from measuring import two_cuts

from ep_export.documents import decode, encode
from ep_export.errors import UsageError
from ep_export.measure.ways import Way, one_cut, scheduled_way
from ep_export.planning import average_keep
from ep_export.policy import Cut, Keep, MaxMin, Random, Schedule, TopK


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("keep", [0.5, 0.6])
@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_the_average_over_all_layers_is_the_keep(layer: int, keep: float, method: str) -> None:
    tokens = 240
    (kept,) = one_cut(layer, method, Keep(ratio=keep)).kept(layers=12, visual_tokens=tokens)
    average = Fraction(layer * tokens + (12 - layer) * kept, 12 * tokens)
    assert average <= Fraction(repr(keep)) < average + Fraction(1, tokens)  # as near as whole tokens allow


def test_two_cuts_at_their_own_average_keep_their_shares() -> None:
    schedule = Schedule((Cut(2, MaxMin(), 0.5), Cut(8, Random(), 0.25)))
    way = scheduled_way(schedule, average_keep(schedule, layers=12), layers=12)
    assert way.kept(layers=12, visual_tokens=240) == (120, 60)
    assert way.schedule == schedule


def test_a_rival_has_the_budget_of_a_chooser() -> None:
    ours, rival = (two_cuts((1, 0.5, m), (3, 0.2, "random"), 0.3) for m in ("divprune", "fastv"))
    assert rival.kept(layers=12, visual_tokens=77) == ours.kept(layers=12, visual_tokens=77)


def test_keys_tell_ways_apart_and_read_like_the_command_line() -> None:
    two = two_cuts((2, 0.5, "divprune"), (8, 0.1, "random"), 0.2)
    assert two.key == "2:0.5:divprune+8:0.1:random@0.2"
    assert one_cut(2, "norm-lowest", Keep(tokens=9)).key == "2:norm-lowest@9 tokens"
    assert decode(Way, json.loads(json.dumps(encode(two)))) == two


def test_impossible_schedules_and_keeps_are_refused() -> None:
    with pytest.raises(UsageError, match="expected a later layer"):
        scheduled_way(Schedule((Cut(3, MaxMin(), 0.5), Cut(3, MaxMin(), 0.2))), Keep(ratio=0.5), layers=12)
    with pytest.raises(UsageError, match="expected 1 to 11"):
        scheduled_way(Schedule((Cut(0, TopK()),)), Keep(ratio=0.5), layers=12)
    late = one_cut(9, "divprune", Keep(ratio=0.5))
    assert not late.fits(layers=12, visual_tokens=100)
    with pytest.raises(UsageError, match="below the smallest possible"):
        late.kept(layers=12, visual_tokens=100)

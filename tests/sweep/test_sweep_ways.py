"""Budgets that mean the same for every method, and costs that are those of `plan`."""

from __future__ import annotations

from fractions import Fraction

import pytest

from ep_export.dims import DecoderDims
from ep_export.errors import UsageError
from ep_export.methods import METHODS, find_methods, policy_method
from ep_export.plan import make_plan
from ep_export.policy import Keep, Policy
from ep_export.sweep.ways import Spot, auto_layers, cost, keeps_after, spots, ways_at

DIMS = DecoderDims(
    layers=12,
    hidden_size=256,
    heads=8,
    kv_heads=4,
    head_dim=32,
    ffn_size=512,
    vocab_size=304,
    max_positions=1024,
    position_axes=3,
)


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("keep", [0.5, 0.6])
def test_the_average_over_all_layers_is_the_keep(layer: int, keep: float) -> None:
    tokens = 240
    kept = keeps_after(Spot(layer, keep), 12, tokens)
    average = Fraction(layer * tokens + (12 - layer) * kept, 12 * tokens)
    assert average <= Fraction(repr(keep)) < average + Fraction(1, tokens)  # as near as whole tokens allow


def test_pruning_before_the_decoder_keeps_the_share_itself() -> None:
    assert keeps_after(Spot(0, 0.25), 12, 154) == 38
    assert keeps_after(Spot(0, 0.001), 12, 154) == 1
    with pytest.raises(UsageError):
        keeps_after(Spot(0, 0.0), 12, 154)


@pytest.mark.parametrize("layer", [1, 3])
def test_costs_are_those_of_the_plan(layer: int) -> None:
    plan = make_plan(DIMS, Policy(layer), Keep(ratio=0.5), visual_tokens=154, text_tokens=30)
    found = cost(DIMS, Spot(layer, 0.5), 154, 30)
    assert (found.flops, found.kv_bytes) == (plan.prefill_flops.pruned, plan.visual_kv_bytes.pruned)
    full = cost(DIMS, Spot(0, 1.0), 154, 30)
    assert (full.flops, full.kv_bytes) == (plan.prefill_flops.full, plan.visual_kv_bytes.full)


@pytest.mark.parametrize(
    ("keep", "layers", "expected"),
    [
        (0.5, 12, (1, 2, 3, 4)),  # layer 5 leaves (6 - 5) / 7 = 0.14, below a third of 0.5
        (0.25, 12, (1, 2)),  # layer 2 leaves 0.1, layer 3 nothing
        (0.125, 12, (1,)),
        (1 / 12, 12, (1,)),  # layer 1 uses it all up, and is all there is
        (0.5, 28, (1, 4, 8, 11)),  # spread over the eleven possible ones
    ],
)
def test_layers_tried_by_default(keep: float, layers: int, expected) -> None:
    assert auto_layers(keep, layers) == expected


def test_an_impossible_keep_names_the_smallest() -> None:
    with pytest.raises(UsageError, match="below the smallest possible"):
        auto_layers(0.05, 12)


def test_impossible_combinations_are_noted_and_the_rest_goes_on() -> None:
    found, notes = spots([0.5, 0.25], 12, [2, 5], find_methods(("fastv",)), {})
    assert found == (Spot(2, 0.5), Spot(5, 0.5), Spot(2, 0.25))
    assert len(notes) == 1
    assert "keep 0.25 at layer 5" in notes[0]
    with pytest.raises(UsageError, match="impossible at every layer"):
        spots([0.25], 12, [5], METHODS, {})
    with pytest.raises(UsageError, match="expected 1 to 11"):
        spots([0.5], 12, [12], METHODS, {})


def test_methods_stand_where_they_can_prune() -> None:
    recommended = policy_method(Policy(3), key="recommended", title="r", source="s")
    found, _ = spots([0.5], 12, [1], METHODS, {0.5: 3})
    assert found == (Spot(0, 0.5), Spot(1, 0.5), Spot(3, 0.5))
    policies = {0.5: (3, recommended)}
    keys = [[way.method.key for way in ways_at(spot, METHODS, policies)] for spot in found]
    assert keys[0] == ["divprune", "cdpruner", "random"]
    assert keys[1] == [method.key for method in METHODS]
    assert keys[2] == [*keys[1], "recommended"]

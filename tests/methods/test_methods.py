"""Every rival against its published definition, on cases small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from views import make_view

from ep_export.errors import UsageError
from ep_export.methods import METHODS, Place, find_methods, method_named
from ep_export.methods.cdpruner import conditional_kernel, cosine_similarity, greedy_map, relevance
from ep_export.methods.dart import least_duplicated
from ep_export.plan import check_schedule
from ep_export.policy import Cut, Schedule, chooser_named

RIVALS = [method for method in METHODS if not method.ours]


def at(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


# FastV ---------------------------------------------------------------------------------------------------


def test_fastv_ranks_by_a_given_attention_map() -> None:
    """Two heads; the last token's attention is written into the keys as log-probabilities."""
    first = torch.tensor([0.10, 0.30, 0.05, 0.35, 0.15, 0.05])  # what head 0 of the last token attends to
    second = torch.tensor([0.10, 0.10, 0.45, 0.05, 0.25, 0.05])
    keys = torch.stack([first.log(), second.log()], dim=1)[..., None]  # [6, 2, 1]
    queries = torch.zeros(6, 2, 1)
    queries[-1] = 1  # scores are then the keys, and softmax gives the probabilities back
    view = make_view(visual=[1, 2, 3, 4], embeds=torch.zeros(6, 2), queries=queries, keys=keys)
    torch.testing.assert_close(view.inside.attention_from(5), (first + second) / 2)
    # means at 1..4: 0.20, 0.25, 0.20, 0.20 (to rounding 1, 3 and 4 tie; see the second case)
    assert method_named("fastv").choose(view, 1).tolist() == [2]
    keys[4, :, 0] = torch.tensor([0.25, 0.25]).log()
    keys[3, :, 0] = torch.tensor([0.01, 0.01]).log()
    view = make_view(visual=[1, 2, 3, 4], embeds=torch.zeros(6, 2), queries=queries, keys=keys)
    assert method_named("fastv").choose(view, 3).tolist() == [1, 2, 4]


def test_attention_is_causal_and_shares_key_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 4, 3, generator=generator)
    keys = torch.randn(5, 2, 3, generator=generator)
    view = make_view(visual=[0], embeds=torch.zeros(5, 2), queries=queries, keys=keys)
    q, k = queries.double().numpy(), keys.double().numpy()
    expected = np.zeros(4)
    for head in range(4):
        scores = np.array([q[3, head] @ k[t, head // 2] for t in range(4)])
        expected += np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() / 4
    np.testing.assert_allclose(view.inside.attention_from(3).numpy(), expected, atol=1e-6)


# DART ----------------------------------------------------------------------------------------------------


def test_dart_with_given_pivots_by_hand() -> None:
    # rows: pivots at 0 and 90 degrees, candidates at 10, 80, 170, 260 degrees
    states = torch.tensor([at(0), at(90), at(10), at(80), at(170), at(260)])
    # pivot at 0: least similar is 170 (cos -0.98), then 260 (-0.17); pivot at 90: of the rest 260 (-0.98)
    assert least_duplicated(states, [0, 1], [2, 3, 4, 5], 2) == [4, 5]
    # three places: the first pivot takes two of them
    assert least_duplicated(states, [0, 1], [2, 3, 4, 5], 3) == [4, 5, 2]  # then 10 degrees, cos(80) = 0.17
    assert least_duplicated(states, [1, 0], [2, 3, 4, 5], 1) == [5]
    assert least_duplicated(states, [0, 1], [2, 3, 4, 5], 0) == []


def test_dart_takes_its_pivots_from_the_keys_and_its_neighbours_from_the_hidden_states() -> None:
    generator = torch.Generator().manual_seed(3)
    visual, text_after = list(range(2, 12)), list(range(12, 18))
    hidden = torch.randn(18, 5, generator=generator)
    keys = torch.randn(18, 1, 3, generator=generator)
    keys[[3, 5, 7, 9]] *= 100  # the visual pivots
    keys[[12, 13, 16, 17]] *= 100  # the text pivots; 0 and 1, before the picture, never count
    keys[[0, 1]] *= 1000
    view = make_view(visual=visual, embeds=torch.zeros(18, 5), hidden=hidden, keys=keys)
    strength = keys.abs().sum(dim=(1, 2))
    order = lambda rows: sorted(rows, key=lambda row: -float(strength[row]))  # noqa: E731 - one line by hand
    pivots = [*order([3, 5, 7, 9]), *order([12, 13, 16, 17])]
    assert set(order(text_after)[:4]) == {12, 13, 16, 17}
    left = [row for row in visual if row not in {3, 5, 7, 9}]
    expected = [3, 5, 7, 9]
    for pivot in pivots[:3]:  # three places beside the four pivots: one for each of the first three
        cosine = {row: float(torch.cosine_similarity(hidden[pivot], hidden[row], dim=0)) for row in left}
        worst = min(left, key=cosine.__getitem__)
        expected.append(worst)
        left.remove(worst)
    assert method_named("dart").choose(view, 7).tolist() == sorted(expected)


def test_dart_keeps_the_strongest_pivots_when_there_is_no_room_for_more() -> None:
    keys = torch.arange(1.0, 9.0)[:, None, None]
    view = make_view(visual=[1, 2, 3, 4, 5], embeds=torch.zeros(8, 2), hidden=torch.ones(8, 2), keys=keys)
    assert method_named("dart").choose(view, 2).tolist() == [4, 5]


# CDPruner ------------------------------------------------------------------------------------------------


def test_greedy_map_equals_greedy_by_determinants() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        features = rng.normal(size=(8, 6))
        kernel = features @ features.T
        expected: list[int] = []
        for _step in range(5):
            rest = [i for i in range(8) if i not in expected]
            gains = [np.linalg.det(kernel[np.ix_([*expected, i], [*expected, i])]) for i in rest]
            expected.append(rest[int(np.argmax(gains))])
        assert greedy_map(kernel, 5) == expected


def test_greedy_map_fills_up_by_relevance_where_the_rank_is_used_up() -> None:
    features = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.5, 0.0], [0.0, 1.0]])
    kernel = features @ features.T  # rank 2: after two tokens every determinant is 0
    assert greedy_map(kernel, 4) == [1, 0, 2, 4]
    assert sorted(greedy_map(np.zeros((3, 3)), 2)) == [0, 1]


def test_cosines_leave_out_lengths_and_a_zero_row_is_like_nothing() -> None:
    cosine = cosine_similarity(torch.tensor([[3.0, 0.0], [0.5, 0.5], [0.0, 0.0]]))
    expected = [[1, math.sqrt(0.5), 0], [math.sqrt(0.5), 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(cosine, expected, atol=1e-12)


def test_relevance_is_the_scaled_mean_cosine() -> None:
    similarity = np.array([[0.2, 0.4], [0.5, 0.7], [0.0, 0.0]])  # means 0.3, 0.6, 0.0
    np.testing.assert_allclose(relevance(similarity), [0.5, 1.0, 0.0], atol=1e-5)
    np.testing.assert_array_equal(relevance(np.full((3, 2), 0.4)), np.ones(3))


def test_cdpruner_prefers_what_the_question_is_about_among_equally_different_tokens() -> None:
    # three tokens at right angles: diversity cannot tell them apart, the word decides; a fourth is a copy
    embeds = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0.8, 0.5, 0.2, 0]])
    view = make_view(visual=[0, 1, 2, 3], embeds=embeds, instruction=[4])
    assert method_named("cdpruner").choose(view, 1).tolist() == [0]
    assert method_named("cdpruner").choose(view, 2).tolist() == [
        0,
        1,
    ]  # not the copy, though it is as relevant
    cosine = np.array([[1.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(
        conditional_kernel(cosine, np.array([0.5, 2.0])), [[0.25, 0.5], [0.5, 4.0]], atol=1e-12
    )


# Those of ours, and all of them ---------------------------------------------------------------------------


def test_methods_of_ours_are_policies_by_name() -> None:
    ours = [method for method in METHODS if method.ours]
    assert [method.chooser.name for method in ours] == [method.key for method in ours]
    assert {method.key for method in METHODS} - {method.key for method in ours} == {
        "fastv",
        "dart",
        "cdpruner",
    }
    assert [method.key for method in METHODS if method.chance] == ["random"]
    assert [method.key for method in METHODS if method.place is Place.ANYWHERE] == [
        "divprune",
        "cdpruner",
        "random",
    ]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("released-highest-key", Place.INSIDE),
        ("norm-lowest-hidden", Place.ANYWHERE),
        ("random-7", Place.ANYWHERE),
        ("nothing", Place.ANYWHERE),
        ("paper-highest-per-picture", Place.INSIDE),
    ],
)
def test_every_policy_is_a_method_that_stands_where_it_can_choose(name: str, place: Place) -> None:
    one = method_named(name)
    assert one.chooser == chooser_named(name)
    assert (one.key, one.place) == (name, place)
    first = 0 if place is Place.ANYWHERE else 1
    check_schedule(Schedule((Cut(first, one.chooser),)), 4)
    if place is Place.INSIDE:
        with pytest.raises(UsageError):
            check_schedule(Schedule((Cut(0, one.chooser),)), 4)


@pytest.mark.parametrize("one", RIVALS, ids=lambda one: one.key)
def test_every_rival_keeps_k_visual_positions_in_order(one) -> None:
    generator = torch.Generator().manual_seed(5)
    visual = [2, 3, 4, 6, 7, 8, 9, 11]
    embeds = torch.randn(16, 4, generator=generator)
    view = make_view(
        visual=visual,
        embeds=embeds,
        hidden=torch.randn(16, 4, generator=generator),
        queries=torch.randn(16, 4, 3, generator=generator),
        keys=torch.randn(16, 2, 3, generator=generator),
        instruction=[12, 13],
    )
    for k in (1, 3, 7, 8):
        kept = one.choose(view, k).tolist()
        assert len(kept) == k
        assert kept == sorted(set(kept))
        assert set(kept) <= set(visual)
    assert one.choose(view, 8).tolist() == visual
    before = make_view(visual=visual, embeds=embeds, instruction=[12, 13])
    if one.place is Place.ANYWHERE:
        assert len(one.choose(before, 3)) == 3
    else:
        with pytest.raises(ValueError, match="K must be at least 1"):
            one.choose(before, 3)


def test_names_are_unique_and_unknown_ones_get_a_suggestion() -> None:
    assert len({one.key for one in METHODS}) == len(METHODS) == 17
    with pytest.raises(UsageError, match="'fastvv' is unknown") as raised:
        find_methods(("fastvv",))
    assert "fastv" in raised.value.hint


def test_methods_come_in_the_order_of_the_tables() -> None:
    keys = ("random", "norm-lowest-key", "fastv", "norm-lowest")
    assert [one.key for one in find_methods(keys)] == ["norm-lowest", "fastv", "random", "norm-lowest-key"]

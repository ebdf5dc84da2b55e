"""Every rival against its published definition, on cases small enough to work out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from views import make_view

from ep_export.entropy import token_scores
from ep_export.errors import UsageError
from ep_export.methods import METHODS, Place, find_methods, policy_method
from ep_export.methods.cdpruner import conditional_kernel, greedy_map, relevance
from ep_export.methods.dart import least_duplicated
from ep_export.methods.divprune import most_diverse
from ep_export.policy import Policy, Scorer, Select, Source


def method(key: str):
    return find_methods((key,))[0]


def at(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


# DivPrune ------------------------------------------------------------------------------------------------

# Six embeddings on a circle: 0 and 10 degrees are near each other, so are 90 and 95. The nearest neighbour of
# 300 is 0, 60 degrees away; that of 200 is 300, 100 degrees away.
CIRCLE = [0, 10, 90, 95, 200, 300]


def test_divprune_of_six_tokens_by_hand() -> None:
    # first: the token whose nearest neighbour is farthest: 200 degrees (nearest: 300, 100 degrees away)
    # second: farthest from 200: 10 by 170 degrees (0 by 160, 90 by 110, 95 by 105, 300 by 100)
    # third: min distance to {200, 10}: 0: 10, 90: 80, 95: 85, 300: 70 -> 95 degrees
    # fourth: 0: 10, 90: 5, 300: 70 (from 10) -> 300 degrees
    view = make_view(
        visual=[1, 2, 3, 4, 5, 6], embeds=torch.tensor([[5.0, 5.0], *map(at, CIRCLE), [1.0, 1.0]])
    )
    choose = method("divprune").choose
    position = {degrees: i + 1 for i, degrees in enumerate(CIRCLE)}
    for k, expected in ((1, [200]), (2, [200, 10]), (3, [200, 10, 95]), (4, [200, 10, 95, 300])):
        assert choose(view, k).tolist() == sorted(position[degrees] for degrees in expected)


def test_divprune_looks_at_directions_and_not_at_lengths() -> None:
    embeds = torch.tensor([*map(at, CIRCLE)])
    stretched = embeds * torch.tensor([1.0, 9.0, 0.1, 3.0, 20.0, 0.5])[:, None]
    for k in range(1, 6):
        plain = method("divprune").choose(make_view(visual=list(range(6)), embeds=embeds), k)
        assert method("divprune").choose(make_view(visual=list(range(6)), embeds=stretched), k).equal(plain)


def test_divprune_never_takes_a_token_twice_even_among_copies() -> None:
    assert sorted(most_diverse(np.zeros((5, 5)), 4)) == [0, 1, 2, 3]


def test_divprune_spreads_better_than_any_first_choice_by_chance() -> None:
    """Its smallest distance is at least half the best possible: what greedy max-min guarantees."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(9, 3))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)  # a metric, as the guarantee asks

    def spread(chosen) -> float:
        return min(distance[a, b] for a, b in itertools.combinations(chosen, 2))

    best = max(map(spread, itertools.combinations(range(9), 4)))
    assert spread(most_diverse(distance, 4)) >= best / 2


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
    assert method("fastv").choose(view, 1).tolist() == [2]
    keys[4, :, 0] = torch.tensor([0.25, 0.25]).log()
    keys[3, :, 0] = torch.tensor([0.01, 0.01]).log()
    view = make_view(visual=[1, 2, 3, 4], embeds=torch.zeros(6, 2), queries=queries, keys=keys)
    assert method("fastv").choose(view, 3).tolist() == [1, 2, 4]


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
    assert method("dart").choose(view, 7).tolist() == sorted(expected)


def test_dart_keeps_the_strongest_pivots_when_there_is_no_room_for_more() -> None:
    keys = torch.arange(1.0, 9.0)[:, None, None]
    view = make_view(visual=[1, 2, 3, 4, 5], embeds=torch.zeros(8, 2), hidden=torch.ones(8, 2), keys=keys)
    assert method("dart").choose(view, 2).tolist() == [4, 5]


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


def test_relevance_is_the_scaled_mean_cosine() -> None:
    similarity = np.array([[0.2, 0.4], [0.5, 0.7], [0.0, 0.0]])  # means 0.3, 0.6, 0.0
    np.testing.assert_allclose(relevance(similarity), [0.5, 1.0, 0.0], atol=1e-5)
    np.testing.assert_array_equal(relevance(np.full((3, 2), 0.4)), np.ones(3))


def test_cdpruner_prefers_what_the_question_is_about_among_equally_different_tokens() -> None:
    # three tokens at right angles: diversity cannot tell them apart, the word decides; a fourth is a copy
    embeds = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0.8, 0.5, 0.2, 0]])
    view = make_view(visual=[0, 1, 2, 3], embeds=embeds, instruction=[4])
    assert method("cdpruner").choose(view, 1).tolist() == [0]
    assert method("cdpruner").choose(view, 2).tolist() == [0, 1]  # not the copy, though it is as relevant
    cosine = np.array([[1.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(
        conditional_kernel(cosine, np.array([0.5, 2.0])), [[0.25, 0.5], [0.5, 4.0]], atol=1e-12
    )


# EntropyPrune, norms, random, and all of them ------------------------------------------------------------


@pytest.mark.parametrize("scorer", list(Scorer))
@pytest.mark.parametrize("select", list(Select))
def test_own_methods_keep_one_end_of_their_score(scorer: Scorer, select: Select) -> None:
    queries = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(2))
    visual = [1, 2, 4, 5, 7, 8]
    view = make_view(visual=visual, embeds=torch.zeros(9, 2), queries=queries, keys=torch.zeros(9, 2, 6))
    scores = token_scores(queries[visual], scorer).tolist()
    best = sorted(zip(scores, visual, strict=True), reverse=select is Select.HIGHEST)[:3]
    kept = method(f"{scorer.value}-{select.value}").choose(view, 3)
    assert kept.tolist() == sorted(position for _, position in best)
    policy = policy_method(Policy(1, scorer, select), key="p", title="p", source="p")
    assert policy.choose(view, 3).equal(kept)


def test_a_policy_on_other_states_is_refused() -> None:
    with pytest.raises(ValueError, match="key states"):
        policy_method(Policy(1, source=Source.KEY), key="p", title="p", source="p")


def test_random_draws_differ_by_seed_and_are_fair() -> None:
    choose = method("random").choose
    kept = [
        choose(make_view(visual=list(range(3, 9)), embeds=torch.zeros(9, 2), seed=s), 2) for s in range(600)
    ]
    counts = np.bincount(torch.cat(kept).numpy(), minlength=9)
    assert counts[:3].sum() == 0
    # each of six tokens is expected 200 times with a standard deviation of 11.5; 60 is five of them
    assert (np.abs(counts[3:] - 200) < 60).all()


@pytest.mark.parametrize("one", METHODS, ids=lambda one: one.key)
def test_every_method_keeps_k_visual_positions_in_order(one) -> None:
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
    assert len({one.key for one in METHODS}) == len(METHODS) == 13
    with pytest.raises(UsageError, match="'fastvv' is unknown") as raised:
        find_methods(("fastvv",))
    assert "fastv" in raised.value.hint

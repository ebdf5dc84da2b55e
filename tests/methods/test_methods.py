"""Every rival against its published definition, on cases small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from views import make_view

from ep_export.choosers import CutTokens, choose
from ep_export.errors import UsageError
from ep_export.measure.ways import Way, WayCut
from ep_export.methods import METHODS, Place, TokenView, find_methods, method_named
from ep_export.methods.cdpruner import conditional_kernel, cosine_similarity, greedy_map, relevance
from ep_export.methods.dart import least_duplicated
from ep_export.methods.scope import cover
from ep_export.methods.sparsevlm import raters
from ep_export.methods.visionzip import dominant_and_contextual
from ep_export.planning import check_schedule
from ep_export.policy import Cut, Keep, Schedule, chooser_named

RIVALS = [method for method in METHODS if method.choose is not None]


def at(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


# FastV ---------------------------------------------------------------------------------------------------


def test_fastv_ranks_by_a_given_attention_map() -> None:
    """Two heads; the last token's attention is written into the keys as log-probabilities."""

    def kept(view: TokenView, k: int) -> list[int]:
        visual = view.visual_index
        tokens = CutTokens(view.hidden[visual], view.inside.attention[visual][..., None], visual)
        return choose(method_named("fastv").chooser, tokens, k).kept.tolist()

    first = torch.tensor([0.10, 0.30, 0.05, 0.35, 0.15, 0.05])  # what head 0 of the last token attends to
    second = torch.tensor([0.10, 0.10, 0.45, 0.05, 0.25, 0.05])
    keys = torch.stack([first.log(), second.log()], dim=1)[..., None]  # [6, 2, 1]
    queries = torch.zeros(6, 2, 1)
    queries[-1] = 1  # scores are then the keys, and softmax gives the probabilities back
    view = make_view(visual=[1, 2, 3, 4], embeds=torch.zeros(6, 2), queries=queries, keys=keys)
    torch.testing.assert_close(view.inside.attention_from(5), (first + second) / 2)
    # means at 1..4: 0.20, 0.25, 0.20, 0.20 (to rounding 1, 3 and 4 tie; see the second case)
    torch.testing.assert_close(view.inside.attention[:, 0], 6 * (first + second) / 2)
    assert kept(view, 1) == [2]
    keys[4, :, 0] = torch.tensor([0.25, 0.25]).log()
    keys[3, :, 0] = torch.tensor([0.01, 0.01]).log()
    view = make_view(visual=[1, 2, 3, 4], embeds=torch.zeros(6, 2), queries=queries, keys=keys)
    assert kept(view, 3) == [1, 2, 4]


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
    ours = [method for method in METHODS if method.chooser is not None]
    assert [method.chooser.name for method in ours] == [method.key for method in ours]
    assert {method.key for method in METHODS} - {method.key for method in ours} == {
        "dart",
        "cdpruner",
        "scope",
        "pyramiddrop",
        "sparsevlm",
        "visionzip",
        "horizon",
        "scaled",
        "scaled-flops",
    }
    assert [method.key for method in METHODS if method.chance] == ["random"]
    assert [method.key for method in METHODS if method.place is Place.ANYWHERE] == [
        "divprune",
        "cdpruner",
        "visionzip",
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
    assert len({one.key for one in METHODS}) == len(METHODS) == 25
    with pytest.raises(UsageError, match="'fastvv' is unknown") as raised:
        find_methods(("fastvv",))
    assert "fastv" in raised.value.hint


def test_methods_come_in_the_order_of_the_tables() -> None:
    keys = ("random", "norm-lowest-key", "fastv", "norm-lowest")
    assert [one.key for one in find_methods(keys)] == [
        "norm-lowest",
        "norm-highest-attention",
        "random",
        "norm-lowest-key",
    ]


def test_scope_takes_what_covers_most_times_its_saliency_by_hand() -> None:
    """Cosines of three tokens: the first two alike, the third apart."""
    similarity = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.2], [0.0, 0.2, 1.0]])
    # first gains 1.9, 2.1, 1.2; after the second 0.1, -, 0.8
    assert cover(similarity, np.ones(3), 3) == [1, 2, 0]
    # salience 3 of the first: 5.7, 2.1, 1.2; then 0, 0.1 + 0.2, 1.0
    assert cover(similarity, np.array([3.0, 1.0, 1.0]), 2) == [0, 2]
    assert cover(similarity, np.array([1.0, 1.0, 0.0]), 3) == [1, 0, 2]
    with pytest.raises(ValueError, match="cannot keep 4 of 3"):
        cover(similarity, np.ones(3), 4)


def test_scope_multiplies_coverage_by_the_attention_of_the_last_token() -> None:
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 0.0]])
    keys = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None].expand(4, 1, 2)
    view = make_view(visual=[0, 1, 2], embeds=hidden, keys=keys, queries=torch.zeros(4, 1, 2))
    assert method_named("scope").choose(view, 2).tolist() == [1, 2]  # equal attention: coverage alone


def test_raters_are_the_words_that_resemble_the_picture() -> None:
    visual = torch.tensor([[4.0, 0.0], [3.0, 0.0]])
    words = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.0]])
    assert raters(visual, words).tolist() == [True, False, True]
    assert raters(visual, words[:1].repeat(3, 1)).tolist() == [True] * 3


def test_sparsevlm_keeps_what_its_raters_attend_to() -> None:
    """Word 3 resembles the picture and looks at token 1; word 4 does not, and looks at token 0."""
    embeds = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, 0.0], [-5.0, 0.0]])
    queries = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 9], [9, 0]])[:, None]
    keys = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0], [0, 0]])[:, None]
    view = make_view(visual=[0, 1, 2], embeds=embeds, keys=keys, queries=queries, instruction=[3, 4])
    assert method_named("sparsevlm-rated").choose(view, 1).tolist() == [1]


def test_visionzip_keeps_what_received_most_and_samples_the_rest_evenly_by_hand() -> None:
    received = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.0, 0.05, 0.15])
    # 7 tokens: 7 * 10 // 64 = 1 contextual; the six best are 1, 3, 5, 7, 8, 6, the first of the rest is 0
    assert dominant_and_contextual(received, 7) == [0, 1, 3, 5, 6, 7, 8]
    assert dominant_and_contextual(received, 3) == [1, 3, 5]
    assert dominant_and_contextual(received, 12) == list(range(12))
    # of 128 of 576 the authors keep 108 and 20; 468 are left, every 23rd of which is a target
    many = torch.arange(576.0)
    kept = dominant_and_contextual(many, 128)
    assert kept == [*range(0, 20 * 23, 23), *range(468, 576)]
    view = make_view(visual=[2, 3, 4, 6], embeds=torch.zeros(8, 2), received=[0.1, 0.4, 0.2, 0.3])
    assert method_named("visionzip").choose(view, 2).tolist() == [3, 6]


@pytest.mark.parametrize("key", ["pyramiddrop", "sparsevlm", "horizon"])
@pytest.mark.parametrize("layers", [4, 12, 32])
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_stages_can_be_followed_at_every_keep(key: str, layers: int, keep: float) -> None:
    stages = method_named(key).stages(layers, keep)
    way = Way(tuple(WayCut(one.layer, one.method, one.share) for one in stages), Keep(ratio=keep))
    kept = way.kept(layers=layers, visual_tokens=576)
    assert list(kept) == sorted(kept, reverse=True)
    ends = [*(one.layer for one in stages[1:]), layers]
    seen = stages[0].layer * 576 + sum(
        k * (end - one.layer) for k, one, end in zip(kept, stages, ends, strict=True)
    )
    assert seen == pytest.approx(keep * layers * 576, abs=layers)


def test_published_stages_are_the_published_ones() -> None:
    """Layers of 32, tokens of 576: arXiv 2410.17247, 2410.04417 and the Information Horizon's scripts."""
    pyramid = method_named("pyramiddrop").stages(32, 0.5)
    assert [(one.layer, one.share) for one in pyramid] == [(8, 0.5), (16, 0.25), (24, 0.125)]
    sparse = method_named("sparsevlm").stages(32, 0.33)
    assert [(one.layer, round(576 * one.share)) for one in sparse] == [(2, 300), (6, 200), (15, 110)]
    horizon = Way(
        tuple(WayCut(one.layer, one.method, one.share) for one in method_named("horizon").stages(32, 1 / 3)),
        Keep(ratio=191.75 / 576),
    )
    assert [(cut.layer, cut.method) for cut in horizon.cuts] == [(0, "divprune"), (20, "random")]
    assert horizon.kept(layers=32, visual_tokens=576) == (284, 38)
    assert method_named("horizon").ours
    assert method_named("pyramiddrop").ours
    assert not method_named("sparsevlm").ours


def test_methods_of_stages_and_pictures_choose_nothing_themselves() -> None:
    for method in METHODS:
        chooses = method.chooser is not None or method.choose is not None
        assert chooses == (method.place in {Place.INSIDE, Place.ANYWHERE})
        assert (method.stages is not None) == (method.place is Place.STAGES)

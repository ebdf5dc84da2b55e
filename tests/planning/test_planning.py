from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from ep_export.dims import DecoderDims
from ep_export.errors import UsageError
from ep_export.planning import (
    average_keep,
    check_schedule,
    kept_tokens,
    layer_flops,
    make_plan,
    settled_keep,
    span_tokens,
)
from ep_export.policy import Cut, Keep, MaxMin, Nothing, Random, Schedule, Source, TopK

LLAVA = DecoderDims(
    layers=32, hidden_size=4096, heads=32, kv_heads=32, head_dim=128, ffn_size=11008,
    vocab_size=32064, max_positions=4096, position_axes=1,
)  # fmt: skip
QWEN = DecoderDims(
    layers=28, hidden_size=3584, heads=28, kv_heads=4, head_dim=128, ffn_size=18944,
    vocab_size=152064, max_positions=128000, position_axes=3,
)  # fmt: skip
MIB = 2**20


def at(layer: int) -> Schedule:
    """One cut, as the keep decides."""
    return Schedule((Cut(layer),))


def one(keep: Keep, *, layers: int, layer: int, visual_tokens: int) -> int:
    (kept,) = kept_tokens(keep, at(layer), layers=layers, visual_tokens=visual_tokens)
    return kept


TWO = Schedule((Cut(2, MaxMin(), 0.5), Cut(12, Random(), 0.1)))
DEEP = Schedule((Cut(2, MaxMin(), 0.5), Cut(12, Nothing(), 0.0)))


@pytest.mark.parametrize(("average", "kept"), [(192, 166), (128, 98)])
@pytest.mark.parametrize("as_ratio", [True, False])
def test_published_budgets_of_llava(average: int, kept: int, as_ratio: bool) -> None:
    keep = Keep(ratio=average / 576) if as_ratio else Keep(tokens=average)
    assert one(keep, layers=32, layer=2, visual_tokens=576) == kept


@pytest.mark.parametrize(("ratio", "share"), [(0.25, 0.2222), (0.125, 0.0926)])
def test_published_budgets_of_qwen(ratio: float, share: float) -> None:
    kept = one(Keep(ratio=ratio), layers=28, layer=1, visual_tokens=1_000_000)
    assert kept / 1_000_000 == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize("layer", [1, 7, 27])
@pytest.mark.parametrize("visual_tokens", [1, 3, 391, 16384])
def test_keep_one_keeps_every_token(layer: int, visual_tokens: int) -> None:
    for keep in (Keep(ratio=1.0), Keep(tokens=visual_tokens)):
        assert one(keep, layers=28, layer=layer, visual_tokens=visual_tokens) == visual_tokens


def test_average_over_layers_is_met_to_within_one_token() -> None:
    for percent in range(10, 101):
        kept = one(Keep(ratio=percent / 100), layers=28, layer=2, visual_tokens=1000)
        average = (2 * 1000 + 26 * kept) / 28
        assert 0 <= percent * 10 - average < 1


def test_binary_fractions_do_not_cost_a_token() -> None:
    # 0.1 * 1000 * 10 is 1000 exactly only when 0.1 means a tenth; a third has no last digit
    assert one(Keep(ratio=0.3), layers=10, layer=1, visual_tokens=900) == 200
    assert one(Keep(ratio=1 / 3), layers=3, layer=1, visual_tokens=900) == 1
    assert one(Keep(ratio=2 / 3), layers=4, layer=1, visual_tokens=9) == 5


def test_smallest_possible_keep_leaves_one_token() -> None:
    assert one(Keep(ratio=1 / 28), layers=28, layer=1, visual_tokens=324) == 1
    assert one(Keep(ratio=0.05), layers=28, layer=1, visual_tokens=3) == 1


def test_no_picture_keeps_nothing_and_small_pictures_keep_all_of_a_token_budget() -> None:
    assert one(Keep(ratio=0.25), layers=28, layer=1, visual_tokens=0) == 0
    assert one(Keep(tokens=192), layers=28, layer=1, visual_tokens=50) == 50


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, 25.0, math.nan, math.inf])
def test_ratio_out_of_range_is_a_usage_error(ratio: float) -> None:
    with pytest.raises(UsageError, match="expected 0 < keep <= 1"):
        one(Keep(ratio=ratio), layers=28, layer=1, visual_tokens=324)


@pytest.mark.parametrize("keep", [Keep(), Keep(ratio=0.5, tokens=3), Keep(tokens=0), Keep(tokens=-4)])
def test_unusable_keep_is_a_usage_error(keep: Keep) -> None:
    with pytest.raises(UsageError):
        one(keep, layers=28, layer=1, visual_tokens=324)


def test_keep_below_what_the_layer_allows_names_a_smallest_that_works() -> None:
    with pytest.raises(UsageError, match=r"below the smallest possible, 0\.0358") as caught:
        one(Keep(ratio=0.03), layers=28, layer=1, visual_tokens=324)
    assert "--keep 0.0358" in caught.value.hint
    assert one(Keep(ratio=0.0358), layers=28, layer=1, visual_tokens=324) >= 1
    with pytest.raises(UsageError, match="below the smallest possible, 12 of 324 tokens"):
        one(Keep(tokens=11), layers=28, layer=1, visual_tokens=324)
    assert one(Keep(tokens=12), layers=28, layer=1, visual_tokens=324) == 1


def test_the_shares_of_cuts_are_what_is_kept_at_their_own_average() -> None:
    keep = average_keep(TWO, layers=28)
    assert keep.ratio == pytest.approx((2 + 10 * 0.5 + 16 * 0.1) / 28)
    for visual in (1, 10, 100, 391, 2880, 16384):
        expected = (max(1, visual // 2), max(1, visual // 10))
        assert kept_tokens(keep, TWO, layers=28, visual_tokens=visual) == expected


@pytest.mark.parametrize("percent", [8, 20, 31, 60, 90, 100])
def test_another_keep_scales_every_share_and_meets_the_average(percent: int) -> None:
    visual = 100_000
    first, second = kept_tokens(Keep(ratio=percent / 100), TWO, layers=28, visual_tokens=visual)
    assert (2 * visual + 10 * first + 16 * second) / 28 == pytest.approx(visual * percent / 100, abs=1)
    assert second <= first <= visual
    if first < visual:
        assert second / first == pytest.approx(0.2, abs=1e-3)


def test_a_cut_that_drops_everything_keeps_none_and_limits_the_average() -> None:
    keep = average_keep(DEEP, layers=28)
    assert keep.ratio == pytest.approx(7 / 28)
    assert kept_tokens(keep, DEEP, layers=28, visual_tokens=391) == (195, 0)
    with pytest.raises(UsageError, match=r"above the largest possible, 0\.4285") as caught:
        kept_tokens(Keep(ratio=0.5), DEEP, layers=28, visual_tokens=391)
    assert "--keep 0.4285" in caught.value.hint
    assert kept_tokens(Keep(ratio=0.4285), DEEP, layers=28, visual_tokens=391)[1] == 0


def test_a_cut_before_the_decoder_leaves_every_average_possible() -> None:
    before = Schedule((Cut(0, MaxMin()),))
    for percent in (1, 25, 100):
        kept = kept_tokens(Keep(ratio=percent / 100), before, layers=28, visual_tokens=1000)
        assert kept == (10 * percent,)
    assert before.spans(28) == (range(28),)


def test_flops_and_caches_follow_every_cut() -> None:
    plan = make_plan(QWEN, TWO, average_keep(TWO, layers=28), visual_tokens=400, text_tokens=50)
    assert plan.kept_visual_tokens == (200, 40)
    spans = [(range(2), 400), (range(2, 12), 200), (range(12, 28), 40)]
    assert list(span_tokens(TWO, 28, 400, plan.kept_visual_tokens)) == spans
    assert plan.prefill_flops.pruned == sum(len(span) * layer_flops(QWEN, n + 50) for span, n in spans)
    assert plan.visual_kv_bytes.pruned == sum(len(span) * n for span, n in spans) * 2 * 4 * 128 * 2


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((), "no cut"),
        ((Cut(3, MaxMin(), 0.5), Cut(3, MaxMin(), 0.4)), "follows one at layer 3"),
        ((Cut(5, MaxMin(), 0.5), Cut(3, MaxMin(), 0.4)), "follows one at layer 5"),
        ((Cut(3, MaxMin(), 0.2), Cut(5, MaxMin(), 0.4)), "more than the 0.2"),
        ((Cut(3), Cut(5, MaxMin(), 0.4)), "has no share"),
        ((Cut(3, Nothing(), 0.0), Cut(5, Nothing(), 0.0)), "no visual token left"),
        ((Cut(3, Nothing(), 0.5),), "keeps nothing"),
        ((Cut(3, MaxMin(), 0.0),), "expected 0 < share <= 1"),
        ((Cut(3, MaxMin(), 1.5),), "expected 0 < share <= 1"),
        ((Cut(3, MaxMin(), math.nan),), "expected 0 < share <= 1"),
        ((Cut(0, TopK()),), "expected 1 to 27"),
        ((Cut(28, MaxMin()),), "expected 0 to 27"),
    ],
)
def test_an_impossible_schedule_is_one_sentence(cuts: tuple[Cut, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_schedule(Schedule(cuts), 28)


def test_scores_of_hidden_states_may_be_taken_before_the_decoder() -> None:
    check_schedule(Schedule((Cut(0, TopK(source=Source.HIDDEN)),)), 28)


def test_a_keep_is_told_or_follows_from_the_shares() -> None:
    assert settled_keep(Keep(tokens=9), TWO, layers=28) == Keep(tokens=9)
    assert settled_keep(None, TWO, layers=28) == average_keep(TWO, layers=28)
    with pytest.raises(UsageError, match="how much to keep is not given"):
        settled_keep(None, at(2), layers=28)


def test_numbers_of_numpy_are_numbers() -> None:
    assert one(Keep(ratio=np.float64(0.25)), layers=28, layer=1, visual_tokens=9000) == 2000
    shares = Schedule((Cut(2, MaxMin(), np.float64(0.5)), Cut(12, Random(), np.float64(0.1))))
    assert average_keep(shares, layers=28) == average_keep(TWO, layers=28)


@pytest.mark.parametrize("layer", [-1, 0, 28, 99])
def test_layer_out_of_range_is_a_usage_error_that_says_the_range(layer: int) -> None:
    with pytest.raises(UsageError, match="expected 1 to 27") as caught:
        make_plan(QWEN, at(layer), Keep(ratio=0.5), visual_tokens=100, text_tokens=10)
    assert caught.value.hint


def test_more_tokens_than_the_picture_has_is_refused_by_a_plan() -> None:
    with pytest.raises(UsageError, match="more than the 100 visual tokens"):
        make_plan(QWEN, at(1), Keep(tokens=101), visual_tokens=100, text_tokens=10)


@pytest.mark.parametrize(("visual", "text"), [(-1, 5), (5, -1)])
def test_negative_token_counts_are_refused(visual: int, text: int) -> None:
    with pytest.raises(UsageError, match="expected 0 or more"):
        make_plan(QWEN, at(1), Keep(ratio=0.5), visual_tokens=visual, text_tokens=text)


@pytest.mark.parametrize("n", [1, 662, 10000])
def test_multi_head_flops_are_the_published_formula(n: int) -> None:
    d, m = 4096, 11008
    assert layer_flops(LLAVA, n) == 8 * n * d**2 + 4 * n**2 * d + 6 * n * d * m


def test_grouped_query_flops_count_every_matrix_once() -> None:
    n, d, heads, kv, size, m = 500, 3584, 28, 4, 128, 18944
    matrices = [(d, heads * size), (d, kv * size), (d, kv * size), (heads * size, d), (d, m), (d, m), (m, d)]
    products = sum(2 * n * rows * columns for rows, columns in matrices)
    attention = heads * (2 * n * size * n + 2 * n * n * size)
    assert layer_flops(QWEN, n) == products + attention


def test_published_flops_of_llava_at_128_tokens() -> None:
    plan = make_plan(LLAVA, at(2), Keep(tokens=128), visual_tokens=576, text_tokens=86)
    assert plan.prefill_flops.full / 1e12 == pytest.approx(8.80, abs=0.005)
    assert plan.prefill_flops.pruned / 1e12 == pytest.approx(2.80, abs=0.005)
    saved = 1 - plan.prefill_flops.pruned / plan.prefill_flops.full
    assert saved == pytest.approx(0.682, abs=0.0005)


def test_published_kv_cache_of_llava() -> None:
    plan = make_plan(LLAVA, at(2), Keep(tokens=192), visual_tokens=576, text_tokens=86)
    assert plan.visual_kv_bytes.full / MIB == 288.0
    assert plan.visual_kv_bytes.pruned / MIB == pytest.approx(95.8, abs=0.05)


def test_kv_cache_counts_key_value_heads_and_element_size() -> None:
    half = make_plan(QWEN, at(1), Keep(ratio=0.25), visual_tokens=391, text_tokens=86)
    single = make_plan(
        QWEN, at(1), Keep(ratio=0.25), visual_tokens=391, text_tokens=86, kv_bytes_per_element=4
    )
    assert half.visual_kv_bytes.full == 28 * 391 * 2 * 4 * 128 * 2
    assert single.visual_kv_bytes.pruned == 2 * half.visual_kv_bytes.pruned


def test_keep_one_saves_nothing() -> None:
    plan = make_plan(QWEN, at(3), Keep(ratio=1.0), visual_tokens=391, text_tokens=86)
    assert plan.prefill_flops.full == plan.prefill_flops.pruned
    assert plan.visual_kv_bytes.full == plan.visual_kv_bytes.pruned


def test_planning_needs_no_heavy_package() -> None:
    code = "import sys, ep_export.planning; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

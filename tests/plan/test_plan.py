from __future__ import annotations

import math
import subprocess
import sys

import pytest

from ep_export.dims import DecoderDims
from ep_export.errors import UsageError
from ep_export.plan import kept_tokens, layer_flops, make_plan
from ep_export.policy import Keep, Policy

LLAVA = DecoderDims(
    layers=32, hidden_size=4096, heads=32, kv_heads=32, head_dim=128, ffn_size=11008,
    vocab_size=32064, max_positions=4096, position_axes=1,
)  # fmt: skip
QWEN = DecoderDims(
    layers=28, hidden_size=3584, heads=28, kv_heads=4, head_dim=128, ffn_size=18944,
    vocab_size=152064, max_positions=128000, position_axes=3,
)  # fmt: skip
MIB = 2**20


@pytest.mark.parametrize(("average", "kept"), [(192, 166), (128, 98)])
@pytest.mark.parametrize("as_ratio", [True, False])
def test_published_budgets_of_llava(average: int, kept: int, as_ratio: bool) -> None:
    keep = Keep(ratio=average / 576) if as_ratio else Keep(tokens=average)
    assert kept_tokens(keep, layers=32, layer=2, visual_tokens=576) == kept


@pytest.mark.parametrize(("ratio", "share"), [(0.25, 0.2222), (0.125, 0.0926)])
def test_published_budgets_of_qwen(ratio: float, share: float) -> None:
    kept = kept_tokens(Keep(ratio=ratio), layers=28, layer=1, visual_tokens=1_000_000)
    assert kept / 1_000_000 == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize("layer", [1, 7, 27])
@pytest.mark.parametrize("visual_tokens", [1, 3, 391, 16384])
def test_keep_one_keeps_every_token(layer: int, visual_tokens: int) -> None:
    for keep in (Keep(ratio=1.0), Keep(tokens=visual_tokens)):
        assert kept_tokens(keep, layers=28, layer=layer, visual_tokens=visual_tokens) == visual_tokens


def test_average_over_layers_is_met_to_within_one_token() -> None:
    for percent in range(10, 101):
        kept = kept_tokens(Keep(ratio=percent / 100), layers=28, layer=2, visual_tokens=1000)
        average = (2 * 1000 + 26 * kept) / 28
        assert 0 <= percent * 10 - average < 1


def test_binary_fractions_do_not_cost_a_token() -> None:
    # 0.1 * 1000 * 10 is 1000 exactly only when 0.1 means a tenth; a third has no last digit
    assert kept_tokens(Keep(ratio=0.3), layers=10, layer=1, visual_tokens=900) == 200
    assert kept_tokens(Keep(ratio=1 / 3), layers=3, layer=1, visual_tokens=900) == 1
    assert kept_tokens(Keep(ratio=2 / 3), layers=4, layer=1, visual_tokens=9) == 5


def test_smallest_possible_keep_leaves_one_token() -> None:
    assert kept_tokens(Keep(ratio=1 / 28), layers=28, layer=1, visual_tokens=324) == 1
    assert kept_tokens(Keep(ratio=0.05), layers=28, layer=1, visual_tokens=3) == 1


def test_no_picture_keeps_nothing_and_small_pictures_keep_all_of_a_token_budget() -> None:
    assert kept_tokens(Keep(ratio=0.25), layers=28, layer=1, visual_tokens=0) == 0
    assert kept_tokens(Keep(tokens=192), layers=28, layer=1, visual_tokens=50) == 50


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, 25.0, math.nan, math.inf])
def test_ratio_out_of_range_is_a_usage_error(ratio: float) -> None:
    with pytest.raises(UsageError, match="expected 0 < keep <= 1"):
        kept_tokens(Keep(ratio=ratio), layers=28, layer=1, visual_tokens=324)


@pytest.mark.parametrize("keep", [Keep(), Keep(ratio=0.5, tokens=3), Keep(tokens=0), Keep(tokens=-4)])
def test_unusable_keep_is_a_usage_error(keep: Keep) -> None:
    with pytest.raises(UsageError):
        kept_tokens(keep, layers=28, layer=1, visual_tokens=324)


def test_keep_below_what_the_layer_allows_names_a_smallest_that_works() -> None:
    with pytest.raises(UsageError, match=r"below the smallest possible, 0\.0358") as caught:
        kept_tokens(Keep(ratio=0.03), layers=28, layer=1, visual_tokens=324)
    assert "--keep 0.0358" in caught.value.hint
    assert kept_tokens(Keep(ratio=0.0358), layers=28, layer=1, visual_tokens=324) >= 1
    with pytest.raises(UsageError, match="below the smallest possible, 12 of 324 tokens"):
        kept_tokens(Keep(tokens=11), layers=28, layer=1, visual_tokens=324)
    assert kept_tokens(Keep(tokens=12), layers=28, layer=1, visual_tokens=324) == 1


@pytest.mark.parametrize("layer", [-1, 0, 28, 99])
def test_layer_out_of_range_is_a_usage_error_that_says_the_range(layer: int) -> None:
    with pytest.raises(UsageError, match="expected 1 to 27") as caught:
        make_plan(QWEN, Policy(layer), Keep(ratio=0.5), visual_tokens=100, text_tokens=10)
    assert caught.value.hint


def test_more_tokens_than_the_picture_has_is_refused_by_a_plan() -> None:
    with pytest.raises(UsageError, match="more than the 100 visual tokens"):
        make_plan(QWEN, Policy(1), Keep(tokens=101), visual_tokens=100, text_tokens=10)


@pytest.mark.parametrize(("visual", "text"), [(-1, 5), (5, -1)])
def test_negative_token_counts_are_refused(visual: int, text: int) -> None:
    with pytest.raises(UsageError, match="expected 0 or more"):
        make_plan(QWEN, Policy(1), Keep(ratio=0.5), visual_tokens=visual, text_tokens=text)


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
    plan = make_plan(LLAVA, Policy(2), Keep(tokens=128), visual_tokens=576, text_tokens=86)
    assert plan.prefill_flops.full / 1e12 == pytest.approx(8.80, abs=0.005)
    assert plan.prefill_flops.pruned / 1e12 == pytest.approx(2.80, abs=0.005)
    saved = 1 - plan.prefill_flops.pruned / plan.prefill_flops.full
    assert saved == pytest.approx(0.682, abs=0.0005)


def test_published_kv_cache_of_llava() -> None:
    plan = make_plan(LLAVA, Policy(2), Keep(tokens=192), visual_tokens=576, text_tokens=86)
    assert plan.visual_kv_bytes.full / MIB == 288.0
    assert plan.visual_kv_bytes.pruned / MIB == pytest.approx(95.8, abs=0.05)


def test_kv_cache_counts_key_value_heads_and_element_size() -> None:
    half = make_plan(QWEN, Policy(1), Keep(ratio=0.25), visual_tokens=391, text_tokens=86)
    single = make_plan(
        QWEN, Policy(1), Keep(ratio=0.25), visual_tokens=391, text_tokens=86, kv_bytes_per_element=4
    )
    assert half.visual_kv_bytes.full == 28 * 391 * 2 * 4 * 128 * 2
    assert single.visual_kv_bytes.pruned == 2 * half.visual_kv_bytes.pruned


def test_keep_one_saves_nothing() -> None:
    plan = make_plan(QWEN, Policy(3), Keep(ratio=1.0), visual_tokens=391, text_tokens=86)
    assert plan.prefill_flops.full == plan.prefill_flops.pruned
    assert plan.visual_kv_bytes.full == plan.visual_kv_bytes.pruned


def test_planning_needs_no_heavy_package() -> None:
    code = "import sys, ep_export.plan; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

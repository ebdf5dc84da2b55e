"""The estimate against figures worked out by hand and counts of real modules."""

import pytest

from ep_export.bundle import Dialect, Precision
from ep_export.checkpoint import meta_model, open_config
from ep_export.first_token import typical_work
from ep_export.fit import estimate
from ep_export.numerics import WeightKind, Weights
from ep_export.planning import make_plan
from ep_export.policy import Cut, Keep, MaxMin, Nothing, Schedule, Scorer, TopK
from ep_export.targets import Graphs, find_target
from ep_export.weight_sizes import weight_sizes

MODELS = ("qwen2.5-vl-3b", "qwen2-vl-2b", "llava-1.5-7b", "llava-onevision-0.5b", "smolvlm2-500m")
MODELS += ("video-llava-7b",)


def plan_of(model, *, layer, ratio=0.25, visual=576, text=86, chooser=TopK()):  # noqa: B008 - frozen
    return plan_with(model, Schedule((Cut(layer, chooser),)), ratio, visual=visual, text=text)


def plan_with(model, schedule, ratio, *, visual=576, text=86, vision=None):
    return make_plan(
        open_config(model).dims,
        schedule,
        Keep(ratio=ratio),
        visual_tokens=visual,
        text_tokens=text,
        vision=vision,
    )


def test_llava_on_an_rtx_4090_as_worked_out_by_hand():
    """d = 4096, 32 layers, 32 heads of 128, m = 11008, 32,064 rows; 662 tokens, 201 from layer 2 on."""
    plan = plan_of("llava-1.5-7b", layer=2)
    assert plan.kept_visual_tokens == (115,)
    guess = estimate(plan, find_target("rtx-ada"), new_tokens=100)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    table = 32_064 * 4096
    assert guess.weight_bytes == 2 * (32 * layer + table)
    assert guess.embedding_bytes == 2 * table
    cache = 2 * 32 * 128 * 2  # bytes of one token in one layer
    assert guess.full.kv_bytes == 2 * cache * 32 * (662 + 100)
    assert guess.pruned.kv_bytes == 2 * cache * (2 * (662 + 100) + 30 * (201 + 100))
    # Prefill of 662 tokens is bound by arithmetic, decoding by memory: 165.2 TFLOPS, 1008 GB/s.
    assert guess.full.prefill_seconds == pytest.approx((8_803_997_188_096 + 2 * table) / 165.2e12, rel=1e-12)
    read = 2 * (32 * layer + table) + cache * 32 * (662 + 50)
    assert guess.full.decode_seconds == pytest.approx(read / 1008e9, rel=1e-12)
    assert guess.full.total_bytes == guess.weight_bytes + guess.full.kv_bytes + guess.full.activation_bytes


def test_a_short_prompt_is_bound_by_memory():
    """201 tokens through 30 layers: reading the weights takes longer than multiplying, on slow memory."""
    plan = plan_of("llava-1.5-7b", layer=2, visual=8, text=1)
    target = find_target("l4")
    guess = estimate(plan, target, new_tokens=1)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32_064 * 4096)
    assert guess.full.prefill_seconds == pytest.approx(weights / 300e9, rel=0.01)


def test_three_spans_as_worked_out_by_hand():
    """LLaVA-1.5-7B cut at layers 2 and 16 to 0.5 and 0.125 of 576: 288 and 72 of them go on."""
    schedule = Schedule((Cut(2, TopK(), 0.5), Cut(16, MaxMin(), 0.125)))
    plan = plan_with("llava-1.5-7b", schedule, (2 + 14 * 0.5 + 16 * 0.125) / 32)
    assert plan.kept_visual_tokens == (288, 72)
    guess = estimate(plan, find_target("rtx-ada"), new_tokens=100)
    cache = 2 * 32 * 128 * 2
    held = 2 * (662 + 100) + 14 * (374 + 100) + 16 * (158 + 100)
    assert guess.pruned.kv_bytes == 2 * cache * held
    assert guess.full.kv_bytes == 2 * cache * 32 * (662 + 100)
    layer, table = 4 * 4096**2 + 3 * 4096 * 11008, 32_064 * 4096
    read = 2 * (32 * layer + table) + cache * (2 * (662 + 50) + 14 * (374 + 50) + 16 * (158 + 50))
    assert guess.pruned.decode_seconds == pytest.approx(read / 1008e9, rel=1e-12)


def test_a_cut_at_the_first_layer_leaves_one_span():
    """DivPrune on the embeddings: 0.25 of 576 for all 32 layers."""
    plan = plan_with("llava-1.5-7b", Schedule((Cut(0, MaxMin()),)), 0.25)
    guess = estimate(plan, find_target("rtx-ada"), new_tokens=100)
    assert guess.pruned.kv_bytes == 2 * (2 * 32 * 128 * 2) * 32 * (144 + 86 + 100)


def test_policies_need_memory_for_what_they_compute():
    """32 heads: [32, 32] matrices a token for entropies; two copies of the states for DivPrune."""
    entropy, norm, divprune, nothing = (
        estimate(
            plan_of("llava-1.5-7b", layer=2, ratio=ratio, chooser=chooser),
            find_target("rtx-ada"),
            new_tokens=1,
        ).full.activation_bytes
        for chooser, ratio in (
            (TopK(), 0.25),
            (TopK(Scorer.NORM), 0.25),
            (MaxMin(), 0.25),
            (Nothing(), 0.0625),
        )
    )
    assert entropy - norm == 576 * 32 * 32 * 4 * 12
    assert divprune - norm == 2 * 576 * 4096 * 4
    assert nothing == norm


def all_but_the_unused(model, config):
    """Parameters by name, without blocks behind the features that are read, which bundles leave out."""
    run = model.family.vision_tower(config).blocks
    unused = tuple(f"encoder.layers.{block}." for block in range(run, 100))
    named = meta_model(config).named_parameters(remove_duplicate=False)
    return {name: p.numel() for name, p in named if not any(part in name for part in unused)}


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_those_of_the_hugging_face_model(model):
    """Within 1 %: norms and biases are left out."""
    opened = open_config(model)
    plan = plan_with(model, Schedule((Cut(2),)), 0.25, vision=typical_work(opened))
    guess = estimate(plan, find_target("rtx-ada"), new_tokens=1)
    counts = all_but_the_unused(opened, opened.config)
    # The last span has the table that both are, or one of two; the other serves on the host.
    table = next(count for name, count in counts.items() if name.endswith("embed_tokens.weight"))
    assert guess.weight_bytes == pytest.approx(2 * (sum(counts.values()) - table), rel=0.01)
    assert guess.embedding_bytes == 2 * table
    tied = bool(opened.config.tie_word_embeddings)
    sizes = weight_sizes(opened.dims, plan.vision.tower, number_bytes=2, weights=None, tied=tied)
    assert sizes.stored == pytest.approx(2 * (sum(counts.values()) - tied * table), rel=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_vision_towers_are_those_of_the_hugging_face_model(model):
    """Gated and ungated feed-forwards, one tower and two; within 2 %, norms, biases and positions."""
    opened = open_config(model)
    parts = ("visual.", "_tower.", "vision_model.", "multi_modal_projector.", "connector.")
    counts = all_but_the_unused(opened, opened.config)
    count = sum(numbers for name, numbers in counts.items() if any(part in name for part in parts))
    assert opened.family.vision_tower(opened.config).parameters == pytest.approx(count, rel=0.02)


def test_bytes_of_quantised_weights_by_hand():
    """LLaVA-1.5-7B: int4 in groups of 128 with fp16 scales, lm_head in 8 bits, the rest in fp16."""
    dims = open_config("llava-1.5-7b").dims
    layer, table = 4 * 4096**2 + 3 * 4096 * 11008, 32_064 * 4096
    int4 = weight_sizes(
        dims, None, number_bytes=2, weights=Weights(WeightKind.INT4, 128, "nearest"), tied=True
    )
    assert int4.stored == 32 * (layer // 2 + layer // 128 * 2) + table + 2 * table
    fp8 = weight_sizes(
        dims, None, number_bytes=2, weights=Weights(WeightKind.FP8, None, "nearest"), tied=True
    )
    assert fp8.stored == 32 * layer + 2 * table


def test_the_vision_encoder_takes_its_share_of_time_and_memory():
    """LLaVA-1.5's tower: 23 blocks of width 1024 over 577 tokens, arithmetic-bound on an RTX 4090."""
    work = typical_work(open_config("llava-1.5-7b"))
    with_it, without = (
        estimate(
            plan_with("llava-1.5-7b", Schedule((Cut(2),)), 0.25, vision=vision),
            find_target("rtx-ada"),
            new_tokens=1,
        )
        for vision in (work, None)
    )
    rows, width = 577, 1024
    flops = 23 * (2 * rows * 12 * width**2 + 4 * rows**2 * width)
    flops += 2 * 576 * (588 * width + width * 4096 + 4096**2)
    assert with_it.full.vision_seconds == pytest.approx(flops / 165.2e12, rel=1e-12)
    assert with_it.full.first_token_seconds == with_it.full.vision_seconds + with_it.full.prefill_seconds
    assert with_it.pruned.vision_seconds == with_it.full.vision_seconds
    assert without.full.prefill_seconds == with_it.full.prefill_seconds
    # States of 577 tokens and one mask.
    more = with_it.full.activation_bytes - without.full.activation_bytes
    assert more == 2 * rows * (7 * width + 3 * 4096) + 4 * rows**2


def test_caches_may_have_another_type():
    plan = plan_of("llava-1.5-7b", layer=2)
    half, eighth = (
        estimate(plan, find_target("rtx-ada"), new_tokens=9, kv_bytes_per_element=size).full.kv_bytes
        for size in (None, 1)
    )
    assert half == 2 * eighth


def test_pruning_never_costs_memory_or_time():
    for name in ("jetson-orin-agx-64gb", "h100", "rtx-turing"):
        plan = plan_of("qwen2.5-vl-7b", layer=1)
        guess = estimate(plan, find_target(name), new_tokens=256)
        for field in ("kv_bytes", "activation_bytes", "total_bytes", "prefill_seconds", "decode_seconds"):
            assert getattr(guess.pruned, field) < getattr(guess.full, field)


def test_portable_graphs_spell_attention_out_and_need_more():
    plan = plan_of("llava-1.5-7b", layer=2)
    portable, modern = (
        estimate(
            plan,
            find_target("rtx-ada"),
            new_tokens=1,
            graphs=Graphs(dialect, Precision.BF16),
        )
        for dialect in (Dialect.PORTABLE, Dialect.MODERN)
    )
    # 32 heads, scores and weights in float32, in both spans.
    assert portable.full.activation_bytes - modern.full.activation_bytes == 2 * (2 * 32 * 662**2 * 4)


def test_a_cpu_has_no_estimate():
    assert estimate(plan_of("llava-1.5-7b", layer=2), find_target("cpu"), new_tokens=1) is None

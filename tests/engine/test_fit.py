"""The estimate against figures worked out by hand and counts of real modules."""

import json

import pytest
import torch
from command_line import ep_export

from ep_export.bundle import Dialect, Precision
from ep_export.checkpoint import meta_model, open_config
from ep_export.fit import FORMULAS, VisionSize, estimate, vision_size
from ep_export.plan import make_plan
from ep_export.policy import Keep, Policy
from ep_export.targets import Graphs, find_target

MODELS = ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "llava-1.5-7b", "llava-1.5-13b")
NO_VISION = VisionSize(0, 0, 0, 0, 1)


def plan_of(model, *, layer, ratio=0.25, visual=576, text=86):
    return make_plan(
        open_config(model).dims, Policy(layer), Keep(ratio=ratio), visual_tokens=visual, text_tokens=text
    )


def test_llava_on_an_rtx_4090_as_worked_out_by_hand():
    """d = 4096, 32 layers, 32 heads of 128, m = 11008, 32,064 rows; 662 tokens, 201 from layer 2 on."""
    plan = plan_of("llava-1.5-7b", layer=2)
    assert plan.kept_visual_tokens == 115
    guess = estimate(plan, find_target("rtx-ada"), NO_VISION, new_tokens=100)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    table = 32_064 * 4096
    assert guess.weight_bytes == 2 * (32 * layer + 2 * table)
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
    guess = estimate(plan, target, NO_VISION, new_tokens=1)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32_064 * 4096)
    assert guess.full.prefill_seconds == pytest.approx(weights / 300e9, rel=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_those_of_the_hugging_face_model(model):
    """Within 2 %, and rather too many: norms are left out, every encoder counts as gated."""
    config = open_config(model)
    plan = plan_of(model, layer=2)
    guess = estimate(plan, find_target("rtx-ada"), vision_size(config.config), new_tokens=1)
    built = meta_model(config.config)
    # An engine each for embeddings and tail: a tied table is there twice.
    count = sum(p.numel() for _, p in built.named_parameters(remove_duplicate=False))
    assert guess.weight_bytes == pytest.approx(2 * count, rel=0.02)
    assert next(built.parameters()).device == torch.device("meta")


def test_pruning_never_costs_memory_or_time():
    for name in ("jetson-orin-agx-64gb", "h100", "rtx-turing"):
        plan = plan_of("qwen2.5-vl-7b", layer=1)
        guess = estimate(plan, find_target(name), NO_VISION, new_tokens=256)
        for field in ("kv_bytes", "activation_bytes", "total_bytes", "prefill_seconds", "decode_seconds"):
            assert getattr(guess.pruned, field) < getattr(guess.full, field)


def test_portable_graphs_spell_attention_out_and_need_more():
    plan = plan_of("llava-1.5-7b", layer=2)
    portable, modern = (
        estimate(
            plan,
            find_target("rtx-ada"),
            NO_VISION,
            new_tokens=1,
            graphs=Graphs(dialect, Precision.BF16),
        )
        for dialect in (Dialect.PORTABLE, Dialect.MODERN)
    )
    # 32 heads, scores and weights in float32, in the head and in the tail.
    assert portable.full.activation_bytes - modern.full.activation_bytes == 2 * (2 * 32 * 662**2 * 4)


def test_a_cpu_has_no_estimate():
    assert estimate(plan_of("llava-1.5-7b", layer=2), find_target("cpu"), NO_VISION, new_tokens=1) is None


def test_plan_with_a_target_says_that_it_is_an_estimate_and_how_it_is_made():
    result = ep_export(
        "plan", "--model", "qwen2.5-vl-7b", "--keep", "0.25", "--target", "jetson-orin-nx-16gb"
    )
    assert result.code == 0, result.err
    assert "estimate" in result.out
    assert "does not fit" in result.out
    for name in FORMULAS:
        assert f"  {name}: " in result.err


def test_plan_json_with_a_target():
    options = ("--model", "qwen2.5-vl-7b", "--keep", "0.25", "--target", "jetson-orin-agx-64gb", "--json")
    said = json.loads(ep_export("plan", *options).out)
    assert {"layers", "ecl", "policy", "prefill_flops"} <= set(said)
    assert said["target"]["fits"] == {"full": True, "pruned": True}
    assert said["target"]["formulas"] == dict(FORMULAS)
    without = json.loads(ep_export("plan", *options[:4], "--json").out)
    assert "target" not in without

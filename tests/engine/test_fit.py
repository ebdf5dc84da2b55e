"""The estimate against figures worked out by hand and counts of real modules."""

import json

import pytest
import torch
from command_line import ep_export

from ep_export.bundle import Dialect, Precision
from ep_export.checkpoint import meta_model, open_config
from ep_export.fit import FORMULAS, VisionSize, estimate, vision_size
from ep_export.plan import make_plan
from ep_export.policy import Cut, Keep, MaxMin, Nothing, Schedule, Scorer, TopK
from ep_export.targets import Graphs, find_target

MODELS = ("qwen2.5-vl-3b", "qwen2-vl-2b", "llava-1.5-7b", "llava-onevision-0.5b", "smolvlm2-500m")
NO_VISION = VisionSize(0, 0, 0, 0, 1)


def plan_of(model, *, layer, ratio=0.25, visual=576, text=86, chooser=TopK()):  # noqa: B008 - frozen
    return plan_with(model, Schedule((Cut(layer, chooser),)), ratio, visual=visual, text=text)


def plan_with(model, schedule, ratio, *, visual=576, text=86):
    return make_plan(
        open_config(model).dims, schedule, Keep(ratio=ratio), visual_tokens=visual, text_tokens=text
    )


def test_llava_on_an_rtx_4090_as_worked_out_by_hand():
    """d = 4096, 32 layers, 32 heads of 128, m = 11008, 32,064 rows; 662 tokens, 201 from layer 2 on."""
    plan = plan_of("llava-1.5-7b", layer=2)
    assert plan.kept_visual_tokens == (115,)
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


def test_three_spans_as_worked_out_by_hand():
    """LLaVA-1.5-7B cut at layers 2 and 16 to 0.5 and 0.125 of 576: 288 and 72 of them go on."""
    schedule = Schedule((Cut(2, TopK(), 0.5), Cut(16, MaxMin(), 0.125)))
    plan = plan_with("llava-1.5-7b", schedule, (2 + 14 * 0.5 + 16 * 0.125) / 32)
    assert plan.kept_visual_tokens == (288, 72)
    guess = estimate(plan, find_target("rtx-ada"), NO_VISION, new_tokens=100)
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
    guess = estimate(plan, find_target("rtx-ada"), NO_VISION, new_tokens=100)
    assert guess.pruned.kv_bytes == 2 * (2 * 32 * 128 * 2) * 32 * (144 + 86 + 100)


def test_policies_need_memory_for_what_they_compute():
    """32 heads: [32, 32] matrices a token for entropies; two copies of the states for DivPrune."""
    entropy, norm, divprune, nothing = (
        estimate(
            plan_of("llava-1.5-7b", layer=2, ratio=ratio, chooser=chooser),
            find_target("rtx-ada"),
            NO_VISION,
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


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_those_of_the_hugging_face_model(model):
    """Within 1 %: norms and biases are left out."""
    config = open_config(model)
    plan = plan_of(model, layer=2)
    guess = estimate(plan, find_target("rtx-ada"), vision_size(config.config), new_tokens=1)
    built = meta_model(config.config)
    # An engine each for the embeddings and the last span: a tied table is there twice.
    count = sum(p.numel() for _, p in built.named_parameters(remove_duplicate=False))
    assert guess.weight_bytes == pytest.approx(2 * count, rel=0.01)
    assert next(built.parameters()).device == torch.device("meta")


@pytest.mark.parametrize("model", MODELS)
def test_vision_towers_are_those_of_the_hugging_face_model(model):
    """Gated and ungated feed-forwards; within 2 %, norms, biases and tables of positions."""
    config = open_config(model)
    size = vision_size(config.config)
    parts = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "connector.")
    count = sum(
        p.numel() for name, p in meta_model(config.config).named_parameters() if any(x in name for x in parts)
    )
    assert size.parameters == pytest.approx(count, rel=0.02)


def test_patches_per_visual_token_of_every_kind_of_merger():
    """Qwen merges squares of 2, SmolVLM squares of 3 or 4, LLaVA none."""
    counts = {
        model: vision_size(open_config(model).config).patches_per_token
        for model in ("qwen2.5-vl-7b", "smolvlm2-2.2b", "smolvlm2-256m", "llava-1.5-7b")
    }
    assert counts == {"qwen2.5-vl-7b": 4, "smolvlm2-2.2b": 9, "smolvlm2-256m": 16, "llava-1.5-7b": 1}


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
    # 32 heads, scores and weights in float32, in both spans.
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
    assert said["fits"] is True
    assert said["target"]["fits"] == {"full": True, "pruned": True}
    assert said["target"]["formulas"] == dict(FORMULAS)
    without = json.loads(ep_export("plan", *options[:4], "--json").out)
    assert not {"target", "fits"} & set(without)


def test_a_model_that_does_not_fit_says_so_to_scripts():
    options = ("--model", "qwen2.5-vl-7b", "--keep", "0.25", "--json", "--target")
    assert json.loads(ep_export("plan", *options, "jetson-orin-nx-16gb").out)["fits"] is False
    assert json.loads(ep_export("plan", *options, "cpu").out)["fits"] is None

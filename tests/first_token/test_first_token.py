"""What a prompt costs up to its first token, and which pictures cost what a pruned one does."""

import math

import pytest
from PIL import Image
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import open_checkpoint, open_config
from ep_export.errors import UserError
from ep_export.families.picture_sizes import scaled_picture, scaled_size
from ep_export.first_token import (
    first_token_flops,
    picture_flops,
    pixels_within,
    processor_settings,
    prompt_plan,
    tokens_work,
    typical_work,
)
from ep_export.policy import Cut, Keep, Schedule

CUT = Schedule((Cut(2),))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_tiny(tmp_path_factory.mktemp("model") / "checkpoint", max_pixels=200 * 784)
    return open_checkpoint(str(path))


@pytest.fixture(scope="module")
def prompt(model):
    prompts = model.family.prompt_builder(model.path, model.config)
    return prompts.build([tiny_picture(300, 200), tiny_picture(100, 100)], "What is this?")


def test_every_picture_of_a_prompt_is_counted(model, prompt):
    plan = prompt_plan(model, prompt)
    tower = model.family.vision_tower(model.config)
    assert [call.grid for call in plan.vision.calls] == [picture.grid[1:] for picture in prompt.pictures]
    assert plan.vision_flops == sum(tower.flops(call) for call in plan.vision.calls)
    assert plan.visual_tokens == prompt.visual_index.size
    assert plan.visual_tokens + plan.text_tokens == prompt.input_ids.size


def test_pruning_saves_the_decoder_alone(model, prompt):
    full = first_token_flops(model, prompt)
    pruned = first_token_flops(model, prompt, CUT, Keep(ratio=0.6))
    plan = prompt_plan(model, prompt, CUT, Keep(ratio=0.6))
    assert full - pruned == plan.prefill_flops.full - plan.prefill_flops.pruned > 0
    assert first_token_flops(model, prompt, CUT, Keep(ratio=1.0)) == full


def test_what_was_kept_counts_where_it_is_known(model, prompt):
    by_keep = prompt_plan(model, prompt, CUT, Keep(ratio=0.6))
    counted = prompt_plan(model, prompt, CUT, Keep(ratio=0.9), kept=by_keep.kept_visual_tokens)
    assert counted.first_token == by_keep.first_token
    assert counted.average_kept == pytest.approx(0.6, abs=0.01)


def test_more_tokens_than_a_small_picture_has_are_all_of_them(model, prompt):
    assert first_token_flops(model, prompt, CUT, Keep(tokens=10_000)) == first_token_flops(model, prompt)


def test_text_alone_has_no_vision(model):
    prompts = model.family.prompt_builder(model.path, model.config)
    plan = prompt_plan(model, prompts.build([], "What is this?"), CUT, Keep(ratio=0.6))
    assert plan.vision_flops == 0
    assert plan.first_token.full == plan.first_token.pruned == plan.prefill_flops.full


def test_a_scaled_picture_costs_what_a_pruned_one_does():
    model = open_config("qwen2.5-vl-7b")
    size, text = (1280, 960), 50
    for share in (0.2, 0.5, 0.8):
        budget = int(share * picture_flops(model, size, text_tokens=text))
        pixels = pixels_within(model, size, budget, text_tokens=text)
        cost = picture_flops(model, scaled_size(size, pixels), text_tokens=text)
        dearer = picture_flops(model, scaled_size(size, pixels + 1), text_tokens=text)
        assert cost <= budget < dearer
        assert cost > 0.9 * budget  # sizes come in steps of a merge block


def test_the_whole_picture_may_be_cheap_enough_and_none_may_be():
    model = open_config("llava-1.5-7b")
    cost = picture_flops(model, (640, 480), text_tokens=86)
    assert pixels_within(model, (640, 480), cost, text_tokens=86) == 640 * 480
    assert pixels_within(model, (640, 480), cost - 1, text_tokens=86) is None


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "llava-next-7b", "llava-onevision-7b", "video-llava-7b"])
def test_visual_tokens_of_a_typical_prompt_are_known_exactly(name):
    model = open_config(name)
    typical = typical_work(model)
    assert tokens_work(model, typical.visual_tokens) == typical


@pytest.mark.parametrize("tokens", [1, 2, 7, 397, 1296, 16384])
def test_visual_tokens_alone_are_nearly_a_picture(tokens):
    model = open_config("qwen2-vl-7b")
    (call,) = tokens_work(model, tokens).calls
    assert call.visual_tokens == tokens
    assert math.prod(call.grid) == pytest.approx(4 * tokens, rel=0.01, abs=0)


def test_visual_tokens_of_tiles_are_whole_tiles():
    """LLaVA-NeXT: 2880 tokens are the picture whole and in four tiles."""
    (call,) = tokens_work(open_config("llava-next-7b"), 2880).calls
    assert (call.tiles, call.grid) == (5, (24, 24))


def test_a_broken_processor_file_is_refused(model, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"max_pixels": "many"}')
    with pytest.raises(UserError, match="max_pixels 'many'"):
        processor_settings(model, tmp_path)


@pytest.mark.parametrize(
    ("size", "pixels", "scaled"),
    [
        ((640, 480), 640 * 480, (640, 480)),
        ((640, 480), 10**9, (640, 480)),
        ((640, 480), 320 * 240, (320, 240)),
        ((1000, 10), 100, (100, 1)),
        ((3, 2), 1, (1, 1)),
    ],
)
def test_pictures_keep_their_shape_when_scaled(size, pixels, scaled):
    assert scaled_size(size, pixels) == scaled
    picture = Image.new("RGB", size)
    assert scaled_picture(picture, pixels).size == scaled
    assert (scaled_picture(picture, pixels) is picture) == (scaled == size)

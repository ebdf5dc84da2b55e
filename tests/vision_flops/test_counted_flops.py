"""Estimated FLOPs against those torch counts in Hugging Face's modules, towers and decoders of every family.

Tiny models run for real, on what the families' own processors make of a picture; published ones on `meta`.
"""

import functools

import pytest
import torch
from tiny import make_tiny, tiny_picture, tiny_video
from tiny_llava import make_tiny_llava, make_tiny_llava_next
from tiny_llava_onevision import make_tiny_llava_onevision
from tiny_smolvlm import make_tiny_smolvlm
from tiny_video_llava import make_tiny_video_llava
from torch.utils.flop_counter import FlopCounterMode

from ep_export.checkpoint import meta_model, open_checkpoint, open_config
from ep_export.errors import UsageError
from ep_export.families import FAMILIES
from ep_export.families.processor_files import image_settings
from ep_export.first_token import prompt_plan
from ep_export.planning import layer_flops

TOLERANCE = 0.02
"""Tables of rotary angles and positions are products too, which the estimate leaves out."""

TINY = {
    "qwen2_5_vl": (make_tiny, {"vision_depth": 4, "vision_full_blocks": (1, 3), "window_size": 112}),
    "qwen2_vl": (make_tiny, {"model_type": "qwen2_vl"}),
    "llava": (make_tiny_llava, {}),
    "llava_next": (make_tiny_llava_next, {}),
    "llava_onevision": (make_tiny_llava_onevision, {}),
    "video_llava": (make_tiny_video_llava, {}),
    "smolvlm": (make_tiny_smolvlm, {}),
}
VIDEOS = ("qwen2_5_vl", "qwen2_vl", "llava_onevision", "video_llava", "smolvlm")
PUBLISHED = ("qwen2.5-vl-7b", "qwen2-vl-2b", "llava-1.5-7b", "llava-next-mistral-7b", "llava-onevision-0.5b")
PUBLISHED += ("video-llava-7b", "smolvlm2-2.2b", "smolvlm2-256m")


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    make, options = TINY[request.param]
    path = make(tmp_path_factory.mktemp(request.param) / "checkpoint", **options)
    opened = open_checkpoint(str(path))
    model = eager(opened.config).from_pretrained(path, config=opened.config).eval()
    return opened, model, opened.family.prompt_builder(path, opened.config)


def eager(config):
    """The model's class, its attention spelled out so that every product is seen by the counter."""
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "eager"
    return type(meta_model(config))


def counted(run, *, blocks=None):
    """FLOPs of `run()`; where a tower reads features of block `blocks`, without those that come after.

    Hugging Face runs them and throws the outcome away; bundles leave them out.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    unused = (f"encoder.layers.{block}" for block in range(blocks, 100)) if blocks is not None else ()
    names = tuple(f".{name}" for name in unused)
    wasted = [sum(c.values()) for name, c in counter.get_flop_counts().items() if name.endswith(names)]
    return counter.get_total_flops() - sum(wasted)


def text_model(opened, model):
    """The decoder without lm_head."""
    norm = opened.family.decoder(model).norm
    return next(module for module in model.modules() if getattr(module, "norm", None) is norm)


def test_every_family_is_here():
    assert set(TINY) == {family.name for family in FAMILIES}
    assert {open_config(name).family.name for name in PUBLISHED} == set(TINY)


def vision_of(model, inputs):
    """Hugging Face's towers and projectors over the pictures and videos of a prompt."""
    kinds = {
        ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask"): "get_image_features",
        ("pixel_values_videos", "video_grid_thw"): "get_video_features",
    }
    for names, method in kinds.items():
        taken = {name: inputs[name] for name in names if name in inputs}
        if taken:
            getattr(model.model, method)(**taken)


@pytest.mark.parametrize("size", [(300, 200), (90, 260)], ids=str)
def test_a_tiny_tower_costs_what_is_counted(tiny, size):
    opened, model, prompts = tiny
    prompt = prompts.build([tiny_picture(*size)], "What is this?")
    inputs = opened.family.reference_inputs(prompt, opened.config)
    blocks = opened.family.vision_tower(opened.config).blocks
    flops = counted(lambda: vision_of(model, inputs), blocks=blocks)
    plan = prompt_plan(opened, prompt)
    assert plan.vision_flops == pytest.approx(flops, rel=TOLERANCE)
    # The same without a prompt, from the picture's size alone.
    call = opened.family.picture_call(size, opened.config, image_settings(opened.path))
    assert plan.vision.calls == (call,)


def test_a_tiny_decoder_costs_what_is_counted(tiny):
    opened, model, prompts = tiny
    prompt = prompts.build([tiny_picture(300, 200)], "What is this?")
    length = prompt.input_ids.shape[1]
    inputs = torch.zeros(1, length, opened.dims.hidden_size)
    text = text_model(opened, model)
    flops = counted(lambda: text(inputs_embeds=inputs, use_cache=False))
    assert prompt_plan(opened, prompt).prefill_flops.full == pytest.approx(flops, rel=TOLERANCE)


@pytest.mark.parametrize("tiny", VIDEOS, indirect=True)
@pytest.mark.parametrize("frames", [1, 5])
def test_a_video_costs_what_is_counted(tiny, frames):
    opened, model, prompts = tiny
    prompt = prompts.build([tiny_video(120, 90, frames=frames)], "What happens?")
    inputs = opened.family.reference_inputs(prompt, opened.config)
    blocks = opened.family.vision_tower(opened.config).blocks
    flops = counted(lambda: vision_of(model, inputs), blocks=blocks)
    plan = prompt_plan(opened, prompt)
    assert plan.vision_flops == pytest.approx(flops, rel=TOLERANCE)
    settings = image_settings(opened.path)
    assert plan.vision.calls == opened.family.video_calls((120, 90), frames, opened.config, settings)


@pytest.mark.parametrize("tiny", ["llava", "llava_next"], indirect=True)
def test_families_without_videos_say_so(tiny):
    opened, _, _ = tiny
    with pytest.raises(UsageError, match="takes no videos"):
        opened.family.video_calls((120, 90), 8, opened.config, {})


@pytest.mark.parametrize("name", PUBLISHED)
class TestPublishedShapes:
    """On `meta`: nothing is computed there, and the counter only reads shapes."""

    def test_the_tower(self, name):
        opened, model = on_meta(name)
        tower = opened.family.vision_tower(opened.config)
        call = opened.family.typical_calls(opened.config)[0]
        flops = counted(lambda: published_tower(model, tower, call), blocks=tower.blocks)
        assert tower.flops(call) == pytest.approx(flops, rel=TOLERANCE)

    def test_the_decoder(self, name):
        opened, model = on_meta(name)
        length = opened.family.default_visual_tokens(opened.config) + 86
        inputs = torch.zeros(1, length, opened.dims.hidden_size, device="meta")
        mask = torch.zeros(1, 1, length, length, device="meta")
        text = text_model(opened, model)
        flops = counted(lambda: text(inputs_embeds=inputs, attention_mask=mask, use_cache=False))
        estimated = opened.dims.layers * layer_flops(opened.dims, length)
        assert estimated == pytest.approx(flops, rel=TOLERANCE)


@functools.cache
def on_meta(name):
    opened = open_config(name)
    eager(opened.config)
    return opened, meta_model(opened.config)


def published_tower(model, tower, call):
    """The tower and its projector without what looks at values, which `meta` has none of."""
    height, width = call.grid
    parts = model.model
    if hasattr(parts, "visual"):
        patches = torch.zeros(height * width, tower.patch_values, device="meta")
        places = torch.zeros(height * width, 2, dtype=torch.int64, device="meta")
        parts.visual(patches, grid_thw=torch.tensor([[1, height, width]]), position_ids=places)
        return
    size = model.config.vision_config.image_size
    pixels = torch.zeros(call.tiles, 3, size, size, device="meta")
    if hasattr(parts, "connector"):
        hidden = parts.vision_model.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2).contiguous()
        parts.connector(parts.vision_model.encoder(inputs_embeds=hidden).last_hidden_state)
        return
    encoder = parts.image_tower if hasattr(parts, "image_tower") else parts.vision_tower
    hidden = encoder(pixels).last_hidden_state
    parts.multi_modal_projector(hidden if tower.class_projected else hidden[:, tower.class_tokens :])

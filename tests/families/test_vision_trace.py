"""The traceable vision encoder against Hugging Face's vision tower, with the same parameters."""

import numpy as np
import pytest
import torch
from tiny import make_tiny, tiny_picture
from transformers import Qwen2_5_VLForConditionalGeneration

from ep_export.families import family_of

FAMILY = family_of("qwen2_5_vl")

# Float32 sums in another order, activations of order 1: a few units in the sixth digit.
TOLERANCE = 2e-5


class Encoder(torch.nn.Module):
    """The cut encoder put together again."""

    def __init__(self, trace):
        super().__init__()
        self.stem, self.blocks, self.merger = trace.stem, torch.nn.ModuleList(trace.blocks), trace.merger

    def forward(self, *feeds):
        hidden, *carry = self.stem(*feeds)
        for block in self.blocks:
            hidden = block(hidden, *carry)
        return self.merger(hidden, *carry)


@pytest.fixture(scope="module", params=["narrow-windows", "wide-windows"])
def model(request, tmp_path_factory):
    shape = {
        "narrow-windows": {"window_size": 56, "vision_full_blocks": (1,)},
        "wide-windows": {
            "window_size": 112,
            "vision_depth": 2,
            "vision_heads": 3,
            "vision_full_blocks": (0,),
        },
    }[request.param]
    path = make_tiny(tmp_path_factory.mktemp("vision") / "checkpoint", layers=1, **shape)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(path).eval().requires_grad_(False)
    loaded.prompts = FAMILY.prompt_builder(path, loaded.config)
    return loaded


def feeds_of(model, size):
    picture = model.prompts.build([tiny_picture(*size)], "What?").pictures[0]
    return picture, tuple(map(torch.from_numpy, FAMILY.vision_feeds(picture, model.config).values()))


@pytest.mark.parametrize("size", [(200, 130), (600, 40), (40, 600), (1, 1), (224, 224), (500, 400)])
def test_embeddings_equal_huggingface(model, size):
    picture, feeds = feeds_of(model, size)
    expected = model.model.visual(
        torch.from_numpy(picture.pixel_values), grid_thw=torch.tensor([picture.grid])
    ).pooler_output
    made = Encoder(FAMILY.vision(model))(*feeds)
    assert made.shape == (picture.token_grid[0] * picture.token_grid[1], expected.shape[1])
    assert (made - expected).abs().max() < TOLERANCE


def test_one_trace_serves_every_picture_size(model):
    trace = FAMILY.vision(model)
    example = tuple(torch.from_numpy(feed) for feed in trace.example_feeds.values())
    dynamic = torch.export.Dim.DYNAMIC
    axes = [dict.fromkeys(trace.dynamic_axes[name], dynamic) for name in trace.example_feeds]
    program = torch.export.export(Encoder(trace), example, dynamic_shapes=(tuple(axes),), strict=False)
    for size in ((600, 40), (300, 200), (1, 1)):
        _, feeds = feeds_of(model, size)
        assert (program.module()(*feeds) - Encoder(trace)(*feeds)).abs().max() < TOLERANCE


def test_the_trace_holds_the_models_own_parameters(model):
    trace = FAMILY.vision(model)
    held = {id(parameter) for parameter in Encoder(trace).parameters()}
    assert held == {id(parameter) for parameter in model.model.visual.parameters()}


def test_buffers_are_real_when_the_model_is_on_meta(model):
    with torch.device("meta"):
        empty = Qwen2_5_VLForConditionalGeneration(model.config)
    (inv_freq,) = FAMILY.vision(empty).stem.buffers()
    assert torch.equal(inv_freq, model.model.visual.rotary_pos_emb.inv_freq)
    rotary = FAMILY.decoder(empty).rotary
    assert torch.equal(rotary.inv_freq, model.model.language_model.rotary_emb.inv_freq)


def test_windows_see_only_their_own_patches(model):
    """Slots without a patch included: whatever stands in patch 0, other windows do not see it."""
    trace = FAMILY.vision(model)
    block = trace.blocks[trace.kinds.index("window")]
    _, feeds = feeds_of(model, (300, 200))
    hidden, *carry = trace.stem(*feeds)
    changed = hidden.clone()
    changed[0] += 100
    index = feeds[2].numpy()
    first = next(window for window in index if 0 in window)
    elsewhere = np.setdiff1d(np.arange(hidden.shape[0]), first)
    assert torch.equal(block(hidden, *carry)[elsewhere], block(changed, *carry)[elsewhere])

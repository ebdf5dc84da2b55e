"""LLaVA-NeXT against Hugging Face: tiles, prompts, vision features, answers full and pruned."""

import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from family_pair import FamilyPair, FamilyTests
from published_graphs import published_graphs, stored_weights
from tiny import tiny_picture
from tiny_llava import (
    LLAVA_TEMPLATE,
    MISTRAL_TEMPLATE,
    RESOLUTIONS,
    Layout,
    make_tiny_llava_next,
    text_config,
    tiny_tokenizer,
    vision_config,
)
from transformers import LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextProcessor

from ep_export.bundle import Dialect
from ep_export.checkpoint import open_checkpoint, open_config
from ep_export.errors import UserError
from ep_export.families import family_of
from ep_export.families.tiles import pack_index, tile_grid, token_cells

FAMILY = family_of("llava_next")
SIZES = {
    "wide": (300, 90),
    "tall": (40, 333),
    "tiny": (3, 3),
    "large": (1200, 900),
    # So flat, or thin, that all patches of its tiles count as padding: only the whole picture is left.
    "flat": (1000, 9),
    "thin": (9, 1000),
}
MODELS = {
    "vicuna, K 2 of 4, today's names": ({}, {"layer": 2}),
    "mistral, K 1 of 3, published names, shards, modern dialect": (
        {
            "layout": Layout.PUBLISHED,
            "template": MISTRAL_TEMPLATE,
            "text": {"model_type": "mistral", "num_hidden_layers": 3},
            "max_shard_size": "100KB",
            "seed": 5,
        },
        {"layer": 1, "dialect": Dialect.MODERN},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("llava-next")
    model, policy = MODELS[request.param]
    return FamilyPair(make_tiny_llava_next(root / "checkpoint", **model), root / "bundle", **policy)


class TestAnswers(FamilyTests):
    prompts: ClassVar = {
        "text": [],
        "one": [tiny_picture(300, 90)],
        "two": [tiny_picture(60, 60), tiny_picture(40, 133, seed=1)],
    }
    shapes: ClassVar = [tiny_picture(*size) for size in SIZES.values()]


@pytest.mark.parametrize("pair", list(MODELS)[-1:], indirect=True)
def test_the_bundle_answers_without_torch(pair, tmp_path):
    tiny_picture(200, 120).save(tmp_path / "picture.png")
    pair.check_without_torch(tmp_path / "picture.png")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_llava_next(tmp_path_factory.mktemp("llava-next-prompt") / "checkpoint", seed=1)


class WithoutTorchvision(LlavaNextProcessor):
    """Hugging Face's processor around the image processor that needs no torchvision."""

    def check_argument_for_proper_class(self, *_):
        return None


def test_prompt_equals_huggingfaces_processor(checkpoint):
    config = open_config(str(checkpoint)).config
    images = LlavaNextImageProcessorPil.from_pretrained(checkpoint)
    theirs = WithoutTorchvision(images, tiny_tokenizer(), 14, "default", LLAVA_TEMPLATE, "<image>", 1)
    pictures = [tiny_picture(*size, seed=i) for i, size in enumerate(SIZES.values())]
    content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": "What is it?"}]
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    made = FAMILY.prompt_builder(checkpoint, config).build(pictures, "What is it?")
    inputs = FAMILY.reference_inputs(made, config)
    assert set(inputs) <= set(expected)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, expected[name]), name
    assert made.position_ids.shape == (1, 1, made.input_ids.shape[1])
    assert made.visual_index.shape[0] == sum(p.visual_tokens for p in made.pictures)


def test_a_flat_picture_is_only_seen_whole(checkpoint):
    prompts = FAMILY.prompt_builder(checkpoint, open_config(str(checkpoint)).config)
    assert prompts.build([tiny_picture(*SIZES["flat"])], "What?").visual_index.shape == (16,)


@pytest.mark.parametrize(
    ("size", "tiles", "tokens"),
    [
        ((672, 672), (2, 2), 576 + 48 * 49),
        ((640, 480), (2, 2), 576 + 36 * 49),
        ((1000, 300), (1, 3), 576 + 22 * 73),
        ((336, 336), (1, 2), 576 + 24 * 25),
    ],
)
def test_tokens_of_the_published_tiles(size, tiles, tokens):
    """By hand: rows and columns inside the padding, one newline a row, 576 for the whole picture."""
    config = open_config("llava-next-vicuna-7b").config
    assert tile_grid(size, config.image_grid_pinpoints, 336) == tiles
    index = pack_index(size, tiles, 24)
    assert index.shape == (tokens,)
    assert np.array_equal(index[:576], np.arange(576))
    newline = 576 * (1 + tiles[0] * tiles[1])
    assert index.max() == newline
    features = index[index < newline]
    assert len(set(features.tolist())) == features.shape[0]


def test_a_row_of_tokens_runs_through_the_tiles_beside_each_other():
    index = pack_index((112, 112), (2, 2), 2)  # tiles of 2 x 2 patches: the whole picture is 0 to 3
    assert index[4:].reshape(4, 5).tolist() == [
        [4, 5, 8, 9, 20],
        [6, 7, 10, 11, 20],
        [12, 13, 16, 17, 20],
        [14, 15, 18, 19, 20],
    ]


def test_tokens_know_their_place_in_the_picture():
    index = pack_index((112, 56), (1, 2), 2)
    grid, cells = token_cells(index, 2)
    assert grid == (2, 4)
    assert cells.tolist() == [-1, -1, -1, -1, 0, 1, 2, 3, -1, 4, 5, 6, 7, -1]


@pytest.mark.parametrize(("size", "tiles", "newlines"), [((1000, 9), (1, 3), 0), ((9, 1000), (3, 1), 12)])
def test_a_picture_without_tiled_patches_is_the_whole_one(size, tiles, newlines):
    grid, cells = token_cells(pack_index(size, tiles, 4), 4)
    assert (grid, cells.tolist()) == ((4, 4), [*range(16), *[-1] * newlines])


def test_a_processor_that_cuts_another_way_is_refused(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    file = copy / "preprocessor_config.json"
    raw = json.loads(file.read_text())
    config = open_config(str(copy)).config
    file.write_text(json.dumps({**raw, "image_grid_pinpoints": [[56, 112]]}))
    with pytest.raises(UserError, match=r"fits pictures into \[\[56, 112\]\]"):
        FAMILY.prompt_builder(copy, config)
    square = {"height": 28, "width": 28}
    file.write_text(json.dumps({**raw, "crop_size": square, "size": {"shortest_edge": 28}}))
    with pytest.raises(UserError, match=r"tiles of shape \[\d+, 3, 28, 28\], expected \[\d, 3, 56, 56\]"):
        FAMILY.prompt_builder(copy, config).build([tiny_picture(60, 60)], "What?")


@pytest.mark.parametrize("layout", [Layout.OLD, Layout.PUBLISHED])
def test_every_layout_of_names_opens_to_the_same_tensors(checkpoint, tmp_path, layout):
    other = make_tiny_llava_next(tmp_path / "other", layout=layout, seed=1)
    assert open_checkpoint(str(other)).fingerprint == open_checkpoint(str(checkpoint)).fingerprint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
        ({"image_grid_pinpoints": [[56, 112], [60, 56]]}, r"\[60, 56\], which is no multiple .* 56 pixels"),
        ({"text_config": {"model_type": "qwen2"}}, "language model 'qwen2'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision tower"),
    ],
)
def test_other_mathematics_is_refused(changes, said):
    parts = {
        "text_config": text_config(),
        "vision_config": vision_config(),
        "image_grid_pinpoints": RESOLUTIONS,
    }
    with pytest.raises(UserError, match=said) as caught:
        FAMILY.dims(LlavaNextConfig(**{**parts, **changes}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("alias", "shape"),
    [
        ("llava-next-vicuna-7b", (32, 4096, 32, 32, 128, 11008, 32064, 4096, 1)),
        ("llava-hf/llava-v1.6-mistral-7b-hf", (32, 4096, 32, 8, 128, 14336, 32064, 32768, 1)),
    ],
)
def test_aliases_have_their_config_without_a_network(alias, shape):
    opened = open_config(alias)
    assert tuple(vars(opened.dims).values()) == shape
    assert FAMILY.default_visual_tokens(opened.config) == 2340


def test_the_graphs_of_the_published_shape_hold_no_weights():
    """2 layers of the 7B model on `meta`."""
    config = open_config("llava-next-mistral-7b").config
    config.text_config.num_hidden_layers = 2
    graphs = published_graphs(FAMILY, config)
    read = stored_weights(graphs["vision_encoder"])
    assert {name for name in read if name.endswith("class_embedding")}
    # 23 of the 24 blocks: features are those before the last
    assert len([name for name in read if name.endswith("fc2.weight")]) == 23
    assert len(stored_weights(graphs["decoder_0"])) == 2 * 9 + 2

"""LLaVA-OneVision against Hugging Face: tiles, several pictures, videos, answers full and pruned."""

import json
import shutil
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from command_line import ep_export
from family_pair import FamilyPair, FamilyTests
from PIL import Image
from pillow_videos import PillowVideos
from published_graphs import published_graphs, stored_weights
from tiny import tiny_picture, tiny_video
from tiny_llava import Layout, text_config
from tiny_llava_onevision import (
    ONEVISION_RESOLUTIONS,
    ONEVISION_TEMPLATE,
    make_tiny_llava_onevision,
    onevision_tokenizer,
    siglip_config,
)
from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil, SiglipImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from ep_export.bundle import Dialect
from ep_export.checkpoint import open_checkpoint, open_config
from ep_export.errors import UserError
from ep_export.families import family_of
from ep_export.families.base import Video
from ep_export.families.llava_onevision_tiles import pack_frame, pack_picture, pack_whole
from ep_export.families.tiles import tile_grid

FAMILY = family_of("llava_onevision")
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
    "0.5b: tied, one file, K 2 of 4, today's names": (
        {"tie_word_embeddings": True, "text": {"tie_word_embeddings": True}},
        {"layer": 2},
    ),
    "7b: shards, K 1 of 3, published names, modern dialect": (
        {
            "layout": Layout.PUBLISHED,
            "text": {"num_hidden_layers": 3},
            "max_shard_size": "100KB",
            "seed": 5,
        },
        {"layer": 1, "dialect": Dialect.MODERN},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("llava-onevision")
    model, policy = MODELS[request.param]
    return FamilyPair(make_tiny_llava_onevision(root / "checkpoint", **model), root / "bundle", **policy)


class TestAnswers(FamilyTests):
    prompts: ClassVar = {
        "text": [],
        "one": [tiny_picture(300, 90)],
        "two": [tiny_picture(60, 60), tiny_picture(40, 133, seed=1)],
        "video": [tiny_video(70, 50, frames=3)],
        "picture and video": [tiny_picture(120, 200), tiny_video(70, 50, frames=2)],
    }
    shapes: ClassVar = [*(tiny_picture(*size) for size in SIZES.values()), tiny_video(70, 50, frames=3)]


@pytest.mark.parametrize("pair", list(MODELS)[-1:], indirect=True)
def test_the_bundle_answers_without_torch(pair, tmp_path):
    tiny_picture(200, 120).save(tmp_path / "picture.png")
    pair.check_without_torch(tmp_path / "picture.png")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_llava_onevision(tmp_path_factory.mktemp("llava-onevision-prompt") / "checkpoint", seed=1)


@pytest.fixture(scope="module")
def prompts(checkpoint):
    return FAMILY.prompt_builder(checkpoint, open_config(str(checkpoint)).config)


class WithoutTorchvision(LlavaOnevisionProcessor):
    """Hugging Face's processor around image processors that need no torchvision."""

    def check_argument_for_proper_class(self, *_):
        return None


@pytest.mark.parametrize(
    "sizes", [list(SIZES.values())[:1], list(SIZES.values()), []], ids=["one", "several", "none"]
)
@pytest.mark.parametrize("videos", [0, 2])
def test_prompt_equals_huggingfaces_processor(checkpoint, prompts, sizes, videos):
    images = LlavaOnevisionImageProcessorPil.from_pretrained(checkpoint)
    frames = PillowVideos(SiglipImageProcessorPil.from_pretrained(checkpoint))
    theirs = WithoutTorchvision(images, onevision_tokenizer(), frames, 25, "full", ONEVISION_TEMPLATE)
    theirs.vision_aspect_ratio = "anyres_max_2"
    pictures = [tiny_picture(*size, seed=i) for i, size in enumerate(sizes)]
    films = [tiny_video(70, 50, frames=3, seed=i) for i in range(videos)]
    content = [*({"type": "image"} for _ in pictures), *({"type": "video"} for _ in films)]
    content.append({"type": "text", "text": "What is it?"})
    text = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = theirs(
        text=[text],
        images=[pictures] if pictures else None,  # one list a prompt, as `apply_chat_template` gives them
        videos=[[np.asarray(frame) for frame in film.frames] for film in films] or None,
        return_tensors="pt",
    )
    made = prompts.build([*pictures, *films], "What is it?")
    inputs = FAMILY.reference_inputs(made, open_config(str(checkpoint)).config)
    assert set(inputs) == set(expected)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, expected[name]), name
    assert np.array_equal(made.position_ids, np.arange(made.input_ids.shape[1])[None, None])
    assert made.visual_index.shape[0] == sum(p.visual_tokens for p in made.pictures)


def mixed(packing, table):
    """[N, d]: the weighted sums, in float64."""
    return (packing.weight[..., None].astype(np.float64) * table[packing.index]).sum(1)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((640, 480), 729 + 40 * 55),
        ((384, 384), 729 + 27 * 28),
        ((1200, 900), 729 + 70 * 94),
        ((2304, 2304), 729 + 81 * 82),
        ((2304, 384), 729 + 27 * 163),
        ((100, 3000), 0),
        ((9000, 50), 0),
    ],
)
def test_packing_equals_huggingface_in_the_published_shape(size, tokens):
    """Their own packing on random features of width 3."""
    config = open_config("llava-onevision-7b").config
    tiles = tile_grid(size, config.image_grid_pinpoints, 384)
    packing = pack_picture(size, tiles, 27, 9)
    features = np.random.default_rng(0).normal(size=(1 + tiles[0] * tiles[1], 729, 3))
    newline = np.array([7.0, -7.0, 0.5])
    (expected,), _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.from_numpy(features)],
        torch.tensor([[size[1], size[0]]]),
        torch.from_numpy(newline),
    )
    made = mixed(packing, np.concatenate([features.reshape(-1, 3), newline[None]]))
    assert made.shape == expected.shape
    assert np.abs(made - expected.numpy()).max() < 1e-5  # weights are float32
    assert not tokens or packing.index.shape == (tokens, 4)
    height, width = packing.token_grid
    assert packing.cells.shape == packing.index.shape[:1]
    assert np.array_equal(packing.cells[packing.cells >= 0], np.arange(height * width))


def test_frames_are_pooled_as_huggingface_does():
    features = np.random.default_rng(1).normal(size=(2, 729, 3))
    config = open_config("llava-onevision-7b").config
    expected = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), torch.from_numpy(features))
    newline = np.full((1, 3), 9.0)
    for last in (False, True):
        packing = pack_frame(27, last=last)
        assert packing.index.shape == (196 + last, 4)
        made = mixed(packing, np.concatenate([features[0], newline]))
        assert np.abs(made[:196] - expected[0].numpy()).max() < 1e-5
        assert np.array_equal(made[196:], newline[: int(last)])
        assert (packing.token_grid, packing.cells[195:].tolist()) == ((14, 14), [195, -1][: 1 + last])


def test_one_of_several_pictures_is_whole_with_one_newline():
    packing = pack_whole(2)
    table = np.arange(5.0)[:, None]
    assert mixed(packing, table).ravel().tolist() == [0, 1, 2, 3, 4]
    assert (packing.token_grid, packing.cells.tolist()) == ((2, 2), [0, 1, 2, 3, -1])


def test_only_a_picture_alone_is_cut_into_tiles(prompts):
    shown = [tiny_picture(300, 90), tiny_video(70, 50, frames=2)]
    alone = prompts.build(shown, "What?").pictures
    again = prompts.build([shown[0], shown[0]], "What?").pictures
    assert [part.pixel_values.shape[0] for part in alone] == [4, 1, 1]
    assert [part.video for part in alone] == [None, 0, 0]
    assert [part.visual_tokens for part in alone][1:] == [9, 10]
    assert [(part.pixel_values.shape[0], part.visual_tokens) for part in again] == [(1, 26), (1, 26)]
    assert prompts.build(shown, "What?").pictures[0].pixel_values.shape[0] == 4  # nothing was left behind


@pytest.mark.parametrize(
    ("size", "view"), [((300, 100), (0, -100, 300, 200)), ((55, 112), (-28, 0, 84, 112))]
)
def test_the_view_of_one_of_several_pictures_is_a_padded_square(prompts, size, view):
    picture = tiny_picture(*size)
    made = prompts.build([picture, picture], "What?").pictures[0]
    assert made.view == view
    side = max(size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(picture, (-view[0], -view[1]))
    again = prompts.build([square, square], "What?").pictures[0]
    assert np.array_equal(again.pixel_values, made.pixel_values)


def test_a_processor_that_cuts_another_way_is_refused(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    file = copy / "preprocessor_config.json"
    raw = json.loads(file.read_text())
    config = open_config(str(copy)).config
    file.write_text(json.dumps({**raw, "image_grid_pinpoints": [[44, 88]]}))
    with pytest.raises(UserError, match=r"fits pictures into \[\[44, 88\]\]"):
        FAMILY.prompt_builder(copy, config)
    file.write_text(json.dumps({**raw, "size": {"height": 22, "width": 22}}))
    prompts = FAMILY.prompt_builder(copy, config)
    for shown in ([tiny_picture(60, 60)], [tiny_video(60, 60, frames=2)]):
        with pytest.raises(
            UserError, match=r"tiles of shape \[\d+, 3, 22, 22\], expected \[\d+, 3, 44, 44\]"
        ):
            prompts.build(shown, "What?")


def test_videos_of_different_length_have_no_reference(checkpoint, prompts):
    film = tiny_video(70, 50, frames=3)
    made = prompts.build([film, Video(film.frames[:2], 2.0)], "What?")
    with pytest.raises(UserError, match="equal length only, got 3, 2 frames"):
        FAMILY.reference_inputs(made, open_config(str(checkpoint)).config)


@pytest.mark.parametrize("layout", [Layout.OLD, Layout.PUBLISHED])
@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_every_layout_of_names_opens_to_the_same_tensors(checkpoint, tmp_path, layout, shards):
    other = make_tiny_llava_onevision(tmp_path / "other", layout=layout, seed=1, max_shard_size=shards)
    made = open_checkpoint(str(other))
    assert made.fingerprint == open_checkpoint(str(checkpoint)).fingerprint
    assert (len({ref.file for ref in made.tensors.values()}) > 1) == (shards == "100KB")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy 'default'"),
        ({"image_grid_pinpoints": [[44, 88], [88, 60]]}, r"\[88, 60\], which is no multiple .* 44 pixels"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres'"),
        ({"text_config": {"model_type": "llama"}}, "language model 'llama', expected qwen2"),
        (
            {"text_config": text_config("qwen2", use_sliding_window=True, sliding_window=64)},
            "sliding-window attention of 64",
        ),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision tower 'clip_vision_model'"),
        ({"vision_config": siglip_config(image_size=[44, 88])}, r"pictures of \[44, 88\]"),
        ({"vision_feature_layer": [-1, -2]}, r"vision layers \[-1, -2\]"),
    ],
)
def test_other_mathematics_is_refused(changes, said):
    parts = {
        "text_config": text_config("qwen2"),
        "vision_config": siglip_config(),
        "image_grid_pinpoints": ONEVISION_RESOLUTIONS,
    }
    with pytest.raises(UserError, match=said) as caught:
        FAMILY.dims(LlavaOnevisionConfig(**{**parts, **changes}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("alias", "shape"),
    [
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", (24, 896, 14, 2, 64, 4864, 152000, 32768, 1)),
        ("llava-onevision-7b", (28, 3584, 28, 4, 128, 18944, 152128, 32768, 1)),
    ],
)
def test_aliases_have_their_config_without_a_network(alias, shape):
    opened = open_config(alias)
    assert tuple(vars(opened.dims).values()) == shape
    assert FAMILY.default_visual_tokens(opened.config) == 2929
    assert opened.config.tie_word_embeddings == ("0.5b" in alias)


def test_a_plan_needs_a_layer_and_no_checkpoint():
    result = ep_export("plan", "--model", "llava-onevision-7b", "--keep", "0.25", "--layer", "2", "--json")
    assert json.loads(result.out)["kept_visual_tokens"] == (28 * 2929 // 4 - 2 * 2929) // 26


def test_the_graphs_of_the_published_shape_hold_no_weights():
    """2 layers of the 7B model on `meta`."""
    config = open_config("llava-onevision-7b").config
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    graphs = published_graphs(FAMILY, config)
    read = stored_weights(graphs["vision_encoder"])
    assert {name for name in read if name.endswith("image_newline")}
    assert (
        len([name for name in read if name.endswith("fc2.weight")]) == config.vision_config.num_hidden_layers
    )
    biases = {name for name in stored_weights(graphs["decoder_0"]) if name.endswith("_proj.bias")}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj"}

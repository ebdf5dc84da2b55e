"""Video-LLaVA against Hugging Face: two towers, prompts, features, answers full and pruned."""

import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from command_line import ep_export
from family_pair import FamilyPair, FamilyTests
from pillow_videos import PillowVideos
from published_graphs import published_graphs, stored_weights
from safetensors.torch import load_file, save_file
from tiny import tiny_picture, tiny_video
from tiny_llava import Layout
from tiny_video_llava import VIDEO_LLAVA_TEMPLATE, make_tiny_video_llava, video_llava_tokenizer
from transformers import CLIPImageProcessorPil, VideoLlavaConfig
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from transformers.models.video_llava.processing_video_llava import VideoLlavaProcessor

from ep_export.bundle import Dialect
from ep_export.checkpoint import open_checkpoint, open_config
from ep_export.errors import UserError
from ep_export.families import family_of

FAMILY = family_of("video_llava")
SIZES = {"wide": (300, 90), "tall": (40, 333), "tiny": (3, 3), "large": (1200, 900)}
MODELS = {
    "K 2 of 4, today's names": ({}, {"layer": 2}),
    "K 1 of 3, published names, shards, class tokens, modern dialect": (
        {
            "layout": Layout.PUBLISHED,
            "text": {"num_hidden_layers": 3},
            "vision_feature_select_strategy": "full",
            "max_shard_size": "100KB",
            "seed": 5,
        },
        {"layer": 1, "dialect": Dialect.MODERN},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("video-llava")
    model, policy = MODELS[request.param]
    return FamilyPair(make_tiny_video_llava(root / "checkpoint", **model), root / "bundle", **policy)


class TestAnswers(FamilyTests):
    prompts: ClassVar = {
        "text": [],
        "one": [tiny_picture(300, 90)],
        "two": [tiny_picture(60, 60), tiny_picture(40, 133, seed=1)],
        "video": [tiny_video(70, 50, frames=8)],
        "picture and video": [tiny_picture(120, 200), tiny_video(70, 50, frames=3)],
    }
    shapes: ClassVar = [*(tiny_picture(*size) for size in SIZES.values()), tiny_video(70, 50, frames=8)]


def test_frames_go_through_a_tower_of_their_own(pair):
    film = tiny_video(70, 50, frames=8)
    prompt = pair.prompt([film.frames[0], film])
    assert [picture.encoder for picture in prompt.pictures] == ["vision_encoder", *["video_encoder"] * 8]
    picture, first = prompt.pictures[:2]
    assert np.array_equal(picture.pixel_values, first.pixel_values)
    made = [
        pair.session.run(each.encoder, FAMILY.vision_feeds(each, pair.model.config))["visual_embeds"][-16:]
        for each in (picture, first)
    ]
    assert np.abs(made[0] - made[1]).max() > 0.1


@pytest.mark.parametrize("pair", list(MODELS)[-1:], indirect=True)
def test_the_bundle_answers_without_torch(pair, tmp_path):
    for i, frame in enumerate(tiny_video(200, 120, frames=3).frames):
        frame.save(tmp_path / f"{i}.png")
    pair.check_without_torch(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_video_llava(tmp_path_factory.mktemp("video-llava-prompt") / "checkpoint", seed=1)


class WithoutTorchvision(VideoLlavaProcessor):
    """Hugging Face's processor around image processors that need no torchvision."""

    def check_argument_for_proper_class(self, *_):
        return None


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize(("sizes", "videos"), [([], 0), (list(SIZES.values()), 0), ([], 1), ([(60, 90)], 2)])
def test_prompt_equals_huggingfaces_processor(checkpoint, sizes, videos, strategy):
    images = VideoLlavaImageProcessor.from_pretrained(checkpoint)
    frames = PillowVideos(CLIPImageProcessorPil.from_pretrained(checkpoint))
    theirs = WithoutTorchvision(
        images, frames, video_llava_tokenizer(), 14, strategy, chat_template=VIDEO_LLAVA_TEMPLATE
    )
    pictures = [tiny_picture(*size, seed=i) for i, size in enumerate(sizes)]
    films = [tiny_video(70, 50, frames=8, seed=i) for i in range(videos)]
    content = [*({"type": "image"} for _ in pictures), *({"type": "video"} for _ in films)]
    content.append({"type": "text", "text": "What is it?"})
    text = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = theirs(
        text=[text],
        images=pictures or None,
        videos=[[np.asarray(frame) for frame in film.frames] for film in films] or None,
        input_data_format="channels_last",  # else it takes the picture of 3 x 3 for channels first
        return_legacy_image_output=False,
        return_tensors="pt",
    )
    config = open_config(str(checkpoint)).config
    config.vision_feature_select_strategy = strategy
    made = FAMILY.prompt_builder(checkpoint, config).build([*pictures, *films], "What is it?")
    inputs = FAMILY.reference_inputs(made, config)
    assert set(inputs) == set(expected)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, expected[name]), name
    assert made.visual_index.shape[0] == len(sizes) * (16 + (strategy == "full")) + videos * 8 * 17
    assert [part.seconds for part in made.pictures] == [0.0] * len(sizes) + [0.5] * (8 * videos)


def test_a_frames_class_token_stands_for_no_place(checkpoint):
    config = open_config(str(checkpoint)).config
    made = FAMILY.prompt_builder(checkpoint, config).build([tiny_video(300, 100, frames=2)], "What?")
    for part in made.pictures:
        assert (part.visual_tokens, part.token_grid, part.view) == (17, (4, 4), (100, 0, 200, 100))
        assert part.cells.tolist() == [-1, *range(16)]


@pytest.mark.parametrize("layout", [Layout.OLD, Layout.PUBLISHED])
@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_every_layout_of_names_opens_to_the_same_tensors(checkpoint, tmp_path, layout, shards):
    other = make_tiny_video_llava(tmp_path / "other", layout=layout, seed=1, max_shard_size=shards)
    made = open_checkpoint(str(other))
    assert made.fingerprint == open_checkpoint(str(checkpoint)).fingerprint
    assert (len({ref.file for ref in made.tensors.values()}) > 1) == (shards == "100KB")


def test_missing_weights_of_one_tower_are_named(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "video_tower" not in name}
    save_file(left, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.video_tower"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": {"model_type": "qwen2"}}, "language model 'qwen2', expected llama or mistral"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision tower 'siglip_vision_model'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision layers \[-2, -5\]"),
    ],
)
def test_other_mathematics_is_refused(changes, said):
    with pytest.raises(UserError, match=said) as caught:
        FAMILY.dims(VideoLlavaConfig(**changes))
    assert caught.value.hint


@pytest.mark.parametrize("alias", ["video-llava-7b", "LanguageBind/Video-LLaVA-7B-hf"])
def test_the_alias_has_its_config_without_a_network(alias):
    opened = open_config(alias)
    assert tuple(vars(opened.dims).values()) == (32, 4096, 32, 32, 128, 11008, 32064, 4096, 1)
    assert FAMILY.default_visual_tokens(opened.config) == opened.config.video_seq_length == 2056


def test_the_plan_is_for_eight_frames():
    """The published setting: half the visual tokens. Where to prune was not published: K is given."""
    result = ep_export("plan", "--model", "video-llava-7b", "--keep", "0.5", "--layer", "2", "--json")
    planned = json.loads(result.out)
    assert (planned["layers"], planned["ecl"], planned["visual_tokens"]) == (32, 2, 2056)
    assert planned["kept_visual_tokens"] == (32 * 1028 - 2 * 2056) // 30
    kv_bytes = planned["visual_kv_bytes"]
    assert kv_bytes["pruned"] / kv_bytes["full"] == pytest.approx(0.5, abs=1e-3)


def test_the_graphs_of_the_published_shape_hold_no_weights():
    """2 layers of the 7B model and both towers on `meta`."""
    config = open_config("video-llava-7b").config
    config.text_config.num_hidden_layers = 2
    graphs = published_graphs(FAMILY, config)
    towers = [stored_weights(graphs[name]) for name in ("vision_encoder", "video_encoder")]
    # one projector, and nothing else in common
    shared = set.intersection(*towers)
    assert {".".join(name.split(".")[-2:]) for name in shared} == {
        f"linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
    }

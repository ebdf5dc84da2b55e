"""SmolVLM2 and Idefics3 against Hugging Face: tiles, prompts, videos, features, answers full and pruned."""

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
from published_graphs import published_graphs
from safetensors.numpy import load_file, save_file
from tiny import tiny_picture, tiny_video
from tiny_smolvlm import SMOLVLM_TEMPLATE, make_tiny_smolvlm, smolvlm_config, smolvlm_tokenizer
from transformers import Idefics3ImageProcessorPil, Idefics3Processor, SmolVLMImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings
from transformers.video_utils import VideoMetadata

from ep_export.bundle import Dialect
from ep_export.checkpoint import meta_model, open_checkpoint, open_config
from ep_export.errors import UserError
from ep_export.families import family_of
from ep_export.families.base import Video
from ep_export.families.number_words import number_words
from ep_export.families.smolvlm_prompt import tile_cells
from ep_export.families.smolvlm_vision import patch_places
from ep_export.policy import Budget, TopK

FAMILY = family_of("smolvlm")
SIZES = {
    "wide": (300, 90),
    "tall": (40, 333),
    "tiny": (3, 3),
    "large": (1200, 900),
    "line": (400, 2),
}
MODELS = {
    "grouped heads, K 2 of 4": ({}, {"layer": 2}),
    # 25 patches along a side: there Hugging Face's rounding puts neighbouring patches on one position.
    "tied, shards, K 1 of 3, modern dialect, 25 patches of a tile with a rest": (
        {
            "tie_word_embeddings": True,
            "scale_factor": 5,
            "text": {"num_hidden_layers": 3, "num_key_value_heads": 4, "tie_word_embeddings": True},
            "vision": {"image_size": 51, "patch_size": 2, "num_hidden_layers": 1},
            "tiles_along": 2,
            "max_shard_size": "100KB",
            "seed": 5,
        },
        {"layer": 1, "dialect": Dialect.MODERN},
    ),
    "idefics3, K 1 of 3, per picture": (
        {"model_type": "idefics3", "text": {"num_hidden_layers": 3}, "tiles_along": 2, "seed": 3},
        {"layer": 1, "chooser": TopK(budget=Budget.PER_PICTURE)},
    ),
}
VIDEO_MODELS = list(MODELS)[:2]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("smolvlm")
    model, policy = MODELS[request.param]
    return FamilyPair(make_tiny_smolvlm(root / "checkpoint", **model), root / "bundle", **policy)


class TestAnswers(FamilyTests):
    prompts: ClassVar = {
        "text": [],
        "one": [tiny_picture(300, 90)],
        "two": [tiny_picture(60, 60), tiny_picture(40, 133, seed=1)],
    }
    shapes: ClassVar = [tiny_picture(*size) for size in SIZES.values()]


@pytest.mark.parametrize("pair", VIDEO_MODELS, indirect=True)
def test_a_video_answers_as_huggingface_full_and_pruned(pair):
    video = tiny_video(90, 60, frames=5, fps=2.0)
    pair.check_everything_kept([video])
    pair.check_pruned([tiny_picture(60, 60), video])
    pair.check_vision([video])


@pytest.mark.parametrize("pair", VIDEO_MODELS[-1:], indirect=True)
def test_the_bundle_answers_without_torch(pair, tmp_path):
    tiny_picture(200, 120).save(tmp_path / "picture.png")
    pair.check_without_torch(tmp_path / "picture.png")


def frames(folder):
    folder.mkdir()
    for i, frame in enumerate(tiny_video(60, 40, frames=3).frames):
        frame.save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize("pair", VIDEO_MODELS[:1], indirect=True)
def test_the_command_line_shows_what_was_kept_of_tiles_and_frames(pair, tmp_path):
    tiny_picture(300, 90).save(tmp_path / "picture.png")
    ask = ("run", str(pair.bundle.path), "--prompt", "What is it?", "--max-new-tokens", "2", "--keep", "0.6")
    picture = ("--image", str(tmp_path / "picture.png"), "--show", str(tmp_path / "kept.png"))
    result = ep_export(*ask, *picture, "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["visual_tokens"] == 16 * (1 * 3 + 1)
    with Image.open(tmp_path / "kept.png") as drawing:
        side, paper = drawing.width // 3, (16, 22, 34)  # one row of three tiles, then a caption
        pixels = np.asarray(drawing.convert("RGB"))
    assert len(pixels) > side
    assert (pixels[side] == paper).all()
    assert not (pixels[side - 1] == paper).all()
    video = ("--video", frames(tmp_path / "frames"), "--show", str(tmp_path / "sheet.png"))
    result = ep_export(*ask, *video, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["visual_tokens"] == 3 * 16
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("pair", list(MODELS)[2:], indirect=True)
def test_the_command_line_refuses_a_video_for_a_family_without(pair, tmp_path):
    video = ("--video", frames(tmp_path / "frames"))
    result = ep_export("run", str(pair.bundle.path), "--prompt", "What is it?", *video)
    assert result.code == 1
    assert result.out == ""
    error, hint = result.err.splitlines()
    assert error == "error: family idefics3 takes no videos"
    assert hint.startswith("hint: give single frames")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_smolvlm(tmp_path_factory.mktemp("smolvlm-prompt") / "checkpoint", seed=1, tiles_along=4)


def prompts(checkpoint):
    return FAMILY.prompt_builder(checkpoint, open_config(str(checkpoint)).config)


class WithoutTorchvision(processing_smolvlm.SmolVLMProcessor):
    """Hugging Face's processor; its video processor, which needs torchvision, is given as a function."""

    def check_argument_for_proper_class(self, *_):
        return None


@pytest.fixture
def processor(checkpoint, monkeypatch):
    words = {2: "two", 3: "three", 65: "sixty-five"}
    monkeypatch.setattr(processing_smolvlm, "num2words", words.__getitem__)
    images = SmolVLMImageProcessorPil.from_pretrained(checkpoint)

    class Videos(SimpleNamespace):
        def __call__(self, videos, *, fps, **_):
            # What the video processor says it does: the image processor without splitting.
            made = images([list(v) for v in videos], do_image_splitting=False, size={"longest_edge": 32})
            metadata = [
                VideoMetadata(len(v), fps=fps, duration=len(v) / fps, frames_indices=list(range(len(v))))
                for v in videos
            ]
            return {**made, "video_metadata": metadata}

    videos = Videos(num_frames=64, fps=1)
    return WithoutTorchvision(images, smolvlm_tokenizer(), videos, 16, chat_template=SMOLVLM_TEMPLATE)


def check_prompt(made, expected, config):
    inputs = FAMILY.reference_inputs(made, config)
    assert set(inputs) <= set(expected)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, expected[name]), name
    assert made.position_ids.shape == (1, 1, made.input_ids.shape[1])
    assert made.visual_index.shape[0] == sum(p.visual_tokens for p in made.pictures)


def test_prompt_equals_huggingfaces_processor(checkpoint, processor):
    pictures = [tiny_picture(*SIZES[name], seed=i) for i, name in enumerate(("wide", "tall", "tiny"))]
    content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(text=[text], images=pictures, add_special_tokens=False, return_tensors="pt")
    made = prompts(checkpoint).build(pictures, "What is it?")
    check_prompt(made, expected, open_config(str(checkpoint)).config)


def test_prompt_of_idefics3_equals_huggingfaces_processor(tmp_path):
    checkpoint = make_tiny_smolvlm(tmp_path / "checkpoint", model_type="idefics3", tiles_along=2)
    images = Idefics3ImageProcessorPil.from_pretrained(checkpoint)
    theirs = type("_", (Idefics3Processor,), {"check_argument_for_proper_class": lambda *_: None})
    processor = theirs(images, smolvlm_tokenizer(), 16, chat_template=SMOLVLM_TEMPLATE)
    pictures = [tiny_picture(90, 40), tiny_picture(20, 30)]
    content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(text=[text], images=pictures, add_special_tokens=False, return_tensors="pt")
    made = prompts(checkpoint).build(pictures, "What is it?")
    check_prompt(made, expected, open_config(str(checkpoint)).config)


@pytest.mark.parametrize(("frames", "fps"), [(3, 2.0), (2, 0.01), (3, 29.97), (65, 49.0)])
def test_prompt_of_a_video_equals_huggingfaces_processor(tmp_path, processor, frames, fps):
    # 65 frames are more than the other tests' context holds.
    checkpoint = make_tiny_smolvlm(tmp_path / "checkpoint", text={"max_position_embeddings": 4096})
    video = tiny_video(30, 20, frames=frames, fps=fps)
    content = [{"type": "video"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(
        text=[text], videos=[list(video.frames)], fps=fps, add_special_tokens=False, return_tensors="pt"
    )
    made = prompts(checkpoint).build([video], "What is it?")
    check_prompt(made, expected, open_config(str(checkpoint)).config)
    assert [picture.video for picture in made.pictures] == [0] * frames


def test_a_picture_in_one_tile_and_its_runs_of_tokens(checkpoint, tmp_path):
    made = prompts(checkpoint).build([tiny_picture(300, 90)], "What?")
    assert made.pictures[0].token_grid == (2 * 4, 4 * 4)
    gaps = np.flatnonzero(np.diff(made.visual_index) > 1)
    assert len(gaps) + 1 == 9  # two rows of four tiles, and the picture seen whole
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    edit(copy, do_image_splitting=False)
    whole = prompts(copy).build([tiny_picture(300, 90)], "What?")
    assert whole.visual_index.shape == (16,)
    assert whole.pictures[0].cells is None


def edit(checkpoint, **changes):
    file = checkpoint / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_tokens_know_their_place_in_the_picture():
    assert tile_cells((1, 2), 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, -1, -1, -1, -1]
    cells = tile_cells((3, 4), 8)
    assert cells.shape == (13 * 64,)
    assert sorted(cells[: 12 * 64]) == list(range(24 * 32))
    assert cells[64] == 8  # the second tile begins beside the first


@pytest.mark.parametrize("side", [4, 8, 19, 25, 26, 27, 32])
def test_positions_of_patches_are_those_of_huggingface(side):
    config = smolvlm_config(vision={"image_size": side, "patch_size": 1, "hidden_size": 4}).vision_config
    theirs = SmolVLMVisionEmbeddings(config)
    table = torch.arange(side * side).float()[:, None].expand(-1, 4)
    with torch.no_grad():
        theirs.position_embedding.weight.copy_(table)
        theirs.patch_embedding.bias.zero_()
        whole = torch.ones(1, side, side, dtype=torch.bool)
        expected = theirs(torch.zeros(1, 3, side, side), whole)[0, :, 0]
    assert patch_places(side).tolist() == expected.long().tolist()
    published = side in {26, 27, 32}
    assert not published or patch_places(side).tolist() == list(range(side * side))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "one"),
        (12, "twelve"),
        (20, "twenty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (999, "nine hundred and ninety-nine"),
    ],
)
def test_numbers_are_spelled_as_num2words_does(number, words):
    assert number_words(number) == words


@pytest.mark.parametrize("number", [-1, 1000])
def test_numbers_beyond_a_video_are_refused(number):
    with pytest.raises(ValueError, match="expected 0 to 999"):
        number_words(number)


def test_a_video_too_long_is_refused(checkpoint):
    still = tiny_picture(4, 4)
    with pytest.raises(UserError, match="1000 frames"):
        prompts(checkpoint).build([Video((still,) * 1000, 1.0)], "What?")
    with pytest.raises(UserError, match="the model's context holds 1024"):
        prompts(checkpoint).build([tiny_video(30, 20, frames=60)], "What?")


def test_idefics3_takes_no_videos(tmp_path):
    checkpoint = make_tiny_smolvlm(tmp_path / "checkpoint", model_type="idefics3")
    with pytest.raises(UserError, match="idefics3 takes no videos"):
        prompts(checkpoint).build([tiny_video(30, 20, frames=2)], "What?")


@pytest.mark.parametrize("markup", ["<image>", "<video>", "<row_1_col_1>", "<end_of_utterance>"])
def test_a_question_places_no_pictures(checkpoint, markup):
    with pytest.raises(UserError, match=markup):
        prompts(checkpoint).build([], f"What {markup} is it?")


def test_a_template_that_loses_the_picture_is_refused(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "<|im_start|>Assistant:"}))
    with pytest.raises(UserError, match="places 0 pictures and 0 videos, 1 and 0 were given") as caught:
        prompts(copy).build([tiny_picture(30, 20)], "What?")
    assert caught.value.hint


def test_a_processor_that_makes_other_tiles_is_refused(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    edit(copy, max_image_size={"longest_edge": 16})
    with pytest.raises(UserError, match=r"tiles of shape \[\d+, 3, 16, 16\], expected \[\d+, 3, 32, 32\]"):
        prompts(copy).build([tiny_picture(60, 60)], "What?")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale_factor": 3}, "squares of 3 x 3 patches in tiles of 8 x 8"),
        ({"scale_factor": 0}, "scale_factor 0, expected three whole numbers"),
        ({"vision": {"image_size": [32, 48]}}, r"tiles of \[32, 48\] pixels"),
        ({"vision": {"image_size": 3}}, "tiles of 0 x 0"),
        ({"text": {"model_type": "mistral", "sliding_window": 16}}, "sliding-window"),
        ({"text": {"num_attention_heads": 4, "num_key_value_heads": 3}}, "do not divide"),
    ],
)
def test_other_mathematics_is_refused(changes, said):
    with pytest.raises(UserError, match=said) as caught:
        FAMILY.dims(smolvlm_config(**changes))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("alias", "shape", "tokens", "parameters"),
    [
        ("smolvlm2-2.2b", (24, 2048, 32, 32, 64, 8192, 49280, 8192, 1), 13 * 81, 2_246_784_880),
        ("smolvlm2-500m", (32, 960, 15, 5, 64, 2560, 49280, 8192, 1), 13 * 64, 507_482_304),
        ("smolvlm2-256m", (30, 576, 9, 3, 64, 1536, 49280, 8192, 1), 13 * 64, 256_484_928),
    ],
)
def test_aliases_have_their_config_without_a_network(alias, shape, tokens, parameters):
    """Every parameter counted, they come to the sizes the models are named after."""
    opened = open_config(alias)
    assert tuple(vars(opened.dims).values()) == shape
    assert FAMILY.default_visual_tokens(opened.config) == tokens
    assert sum(p.numel() for p in meta_model(opened.config).parameters()) == parameters


def test_the_graphs_of_the_published_shape_hold_no_weights(monkeypatch):
    """2 layers of the 2.2B model on `meta`; the table of patch places is the only array."""
    config = open_config("smolvlm2-2.2b").config
    config.text_config.num_hidden_layers = 2
    monkeypatch.setattr("published_graphs.LARGEST_CONSTANT", 8 * 27 * 27 + 1)
    graphs = published_graphs(FAMILY, config)
    held = [v.const_value for v in graphs["vision_encoder"].graph.initializers.values()]
    assert [value.shape for value in held if value.nbytes == 8 * 27 * 27]


def test_lost_vision_weights_are_named(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "vision_model" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"none of the \d+ tensors of model\.vision_model"):
        open_checkpoint(str(copy))

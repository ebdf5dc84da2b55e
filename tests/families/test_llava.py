"""LLaVA-1.5 against Hugging Face: prompts, vision features, answers full and pruned, and what is refused."""

import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
from command_line import ep_export
from family_pair import FamilyPair, FamilyTests
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_picture, tiny_video
from tiny_llava import LLAVA_TEMPLATE, Layout, make_tiny_llava, text_config, tiny_tokenizer, vision_config
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaImageProcessorPil, LlavaProcessor

from ep_export.bundle import Dialect
from ep_export.checkpoint import open_checkpoint, open_config
from ep_export.errors import UserError
from ep_export.families import family_of

FAMILY = family_of("llava")
SIZES = {"wide": (300, 90), "tall": (40, 333), "tiny": (3, 3), "large": (1200, 900)}
MODELS = {
    "llama, K 2 of 4, today's names": ({}, {"layer": 2}),
    "mistral, K 1 of 3, published names, shards, modern dialect": (
        {
            "layout": Layout.PUBLISHED,
            "image_processor": "LlavaImageProcessor",
            "text": {"model_type": "mistral", "num_hidden_layers": 3, "head_dim": 24},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "max_shard_size": "100KB",
            "seed": 5,
        },
        {"layer": 1, "dialect": Dialect.MODERN},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    model, policy = MODELS[request.param]
    return FamilyPair(make_tiny_llava(root / "checkpoint", **model), root / "bundle", **policy)


class TestAnswers(FamilyTests):
    prompts: ClassVar = {
        "text": [],
        "one": [tiny_picture(300, 90)],
        "two": [tiny_picture(60, 60), tiny_picture(40, 90, seed=1)],
    }
    shapes: ClassVar = [tiny_picture(*size) for size in SIZES.values()]


@pytest.mark.parametrize("pair", list(MODELS)[-1:], indirect=True)
def test_the_bundle_answers_without_torch(pair, tmp_path):
    tiny_picture(200, 120).save(tmp_path / "picture.png")
    pair.check_without_torch(tmp_path / "picture.png")


class WithoutTorchvision(LlavaProcessor):
    """Hugging Face's processor around the image processor that needs no torchvision."""

    def check_argument_for_proper_class(self, *_):
        return None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_llava(tmp_path_factory.mktemp("llava-prompt") / "checkpoint", seed=1)


@pytest.mark.parametrize(("kind", "pad"), [(CLIPImageProcessorPil, False), (LlavaImageProcessorPil, True)])
def test_prompt_equals_huggingfaces_processor(checkpoint, tmp_path, kind, pad):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    square = {"height": 56, "width": 56}
    images = kind(size={"shortest_edge": 56}, crop_size=square, do_pad=pad)
    (copy / "preprocessor_config.json").unlink()
    theirs = WithoutTorchvision(images, tiny_tokenizer(), 14, "default", LLAVA_TEMPLATE, "<image>", 1)
    theirs.save_pretrained(copy)  # nested in processor_config.json, as transformers writes it today
    pictures = [tiny_picture(*size, seed=i) for i, size in enumerate(SIZES.values())]
    content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": "What is\n\nit?"}]
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    made = FAMILY.prompt_builder(copy, open_config(str(copy)).config).build(pictures, "What is\n\nit?")
    assert np.array_equal(made.input_ids, expected["input_ids"])
    assert made.input_ids[0, 0] == 1
    assert 1 not in made.input_ids[0, 1:]
    pixels = np.concatenate([picture.pixel_values for picture in made.pictures])
    assert np.array_equal(pixels, expected["pixel_values"])
    assert np.array_equal(made.position_ids, np.arange(made.input_ids.shape[1])[None, None])
    assert made.next_position == made.input_ids.shape[1]
    assert [p.token_grid for p in made.pictures] == [(4, 4)] * len(pictures)


@pytest.mark.parametrize(
    ("files", "size", "view"),
    [
        ({}, (300, 100), (100, 0, 200, 100)),
        ({}, (56, 112), (0, 28, 56, 84)),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, (300, 100), (0, -100, 300, 200)),
    ],
)
def test_the_view_is_what_the_image_processor_sees(checkpoint, tmp_path, files, size, view):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **files}))
    prompts = FAMILY.prompt_builder(copy, open_config(str(copy)).config)
    picture = tiny_picture(*size)
    made = prompts.build([picture], "What?").pictures[0]
    assert made.view == view
    inside = (max(view[0], 0), max(view[1], 0), min(view[2], size[0]), min(view[3], size[1]))
    blank = Image.new("RGB", size)
    blank.paste(picture.crop(inside), inside[:2])  # nothing outside the view is looked at
    again = prompts.build([blank], "What?").pictures[0]
    assert np.abs(again.pixel_values - made.pixel_values)[:, :, 2:-2, 2:-2].max() == 0


def test_the_class_token_stands_for_no_place(checkpoint):
    config = open_config(str(checkpoint)).config
    config.vision_feature_select_strategy = "full"
    made = FAMILY.prompt_builder(checkpoint, config).build([tiny_picture(60, 60)], "What?").pictures[0]
    assert (made.visual_tokens, made.token_grid) == (17, (4, 4))
    kept = np.zeros(17, dtype=np.bool_)
    kept[[0, 1, 16]] = True
    assert np.flatnonzero(made.kept_cells(kept)).tolist() == [0, 15]


def test_a_template_that_begins_the_sequence_is_not_begun_twice(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "<s>" + LLAVA_TEMPLATE}))
    config = open_config(str(checkpoint)).config
    ids = [FAMILY.prompt_builder(path, config).build([], "hello").input_ids for path in (checkpoint, copy)]
    assert np.array_equal(*ids)


def test_a_processor_for_another_size_is_refused(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "preprocessor_config.json").write_text('{"crop_size": 70, "size": {"shortest_edge": 70}}')
    prompts = FAMILY.prompt_builder(copy, open_config(str(copy)).config)
    with pytest.raises(UserError, match="70 x 70 pixels, the model takes 56 x 56"):
        prompts.build([tiny_picture(60, 60)], "What?")
    (copy / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    with pytest.raises(UserError, match="SiglipImageProcessor"):
        FAMILY.prompt_builder(copy, open_config(str(copy)).config)


@pytest.mark.parametrize("layout", [Layout.OLD, Layout.PUBLISHED])
@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_every_layout_of_names_opens_to_the_same_tensors(checkpoint, tmp_path, layout, shards):
    other = make_tiny_llava(tmp_path / "other", layout=layout, seed=1, max_shard_size=shards)
    expected, made = open_checkpoint(str(checkpoint)), open_checkpoint(str(other))
    assert set(made.tensors) == set(expected.tensors)
    assert made.fingerprint == expected.fingerprint
    assert (len({ref.file for ref in made.tensors.values()}) > 1) == (shards == "100KB")


def test_a_video_is_refused(checkpoint):
    prompts = FAMILY.prompt_builder(checkpoint, open_config(str(checkpoint)).config)
    with pytest.raises(UserError, match="family llava takes no videos") as caught:
        prompts.build([tiny_picture(60, 60), tiny_video(60, 60, 2)], "What?")
    assert "pictures" in caught.value.hint


def test_tied_embeddings_are_one_table(tmp_path):
    changes = {"tie_word_embeddings": True, "text": {"tie_word_embeddings": True, "num_hidden_layers": 2}}
    path = make_tiny_llava(tmp_path / "tied", layout=Layout.OLD, **changes)
    assert "lm_head.weight" not in open_checkpoint(str(path)).tensors
    FamilyPair(path, tmp_path / "bundle", layer=1).check_everything_kept([tiny_picture(60, 60)])


def test_missing_vision_weights_are_named(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    save_file(left, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"none of the \d+ tensors of model\.vision_tower"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": {"model_type": "qwen2"}}, "language model 'qwen2', expected llama or mistral"),
        ({"text_config": {"model_type": "mistral", "sliding_window": 64}}, "sliding-window attention of 64"),
        ({"text_config": text_config(num_key_value_heads=3)}, "3 kv heads"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision tower 'siglip_vision_model'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision layers \[-2, -5\]"),
        ({"vision_feature_layer": -9}, "vision layer -9 in a tower of 3"),
        ({"vision_feature_layer": 0}, "vision layer 0"),
    ],
)
def test_other_mathematics_is_refused(changes, said):
    parts = {"text_config": text_config(), "vision_config": vision_config()}
    with pytest.raises(UserError, match=said) as caught:
        FAMILY.dims(LlavaConfig(**{**parts, **changes}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("alias", "shape"),
    [
        ("llava-1.5-7b", (32, 4096, 32, 32, 128, 11008, 32064, 4096, 1)),
        ("llava-hf/llava-1.5-13b-hf", (40, 5120, 40, 40, 128, 13824, 32064, 4096, 1)),
    ],
)
def test_aliases_have_their_config_without_a_network(alias, shape):
    opened = open_config(alias)
    assert tuple(vars(opened.dims).values()) == shape
    assert FAMILY.default_visual_tokens(opened.config) == 576


def test_the_plan_of_the_published_budgets():
    """The paper's averages of 192 and 128 tokens, with 86 text tokens and its K = 2."""
    planned = {}
    for tokens in ("192", "128"):
        result = ep_export(
            "plan", "--model", "llava-1.5-7b", "--keep-tokens", tokens, "--text-tokens", "86", "--json"
        )
        planned[tokens] = json.loads(result.out)
    at_192, at_128 = planned["192"], planned["128"]
    assert (at_192["layers"], at_192["ecl"], at_192["visual_tokens"]) == (32, 2, 576)
    assert (at_192["kept_visual_tokens"], at_128["kept_visual_tokens"]) == (166, 98)
    mebibytes = {name: value / 2**20 for name, value in at_192["visual_kv_bytes"].items()}
    assert mebibytes == pytest.approx({"full": 288.0, "pruned": 95.8}, abs=0.05)
    assert at_128["prefill_flops"]["full"] == pytest.approx(8.80e12, rel=0.005)
    assert at_128["prefill_flops"]["pruned"] == pytest.approx(2.80e12, rel=0.005)


def test_the_published_layer_is_listed_with_its_provenance():
    models = {model["alias"]: model for model in json.loads(ep_export("models", "--json").out)["models"]}
    assert (models["llava-1.5-7b"]["ecl"], models["llava-1.5-7b"]["provenance"]) == (2, "published")
    assert (models["llava-1.5-13b"]["ecl"], models["llava-1.5-13b"]["provenance"]) == (None, "unknown")
    assert "not available here" in models["llava-1.5-7b"]["verified"]

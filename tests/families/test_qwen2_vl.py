"""Qwen2-VL and Qwen2.5-VL against Hugging Face: pictures and videos, answers full and pruned."""

import json
from typing import ClassVar

import numpy as np
import pytest
from command_line import ep_export
from family_pair import FamilyPair, FamilyTests
from published_graphs import published_graphs, stored_weights
from tiny import make_tiny, mrope_section, tiny_picture, tiny_video
from transformers import Qwen2VLConfig

from ep_export.bundle import Dialect
from ep_export.checkpoint import open_checkpoint, open_config
from ep_export.errors import UserError
from ep_export.families import family_of
from ep_export.policy import Budget, TopK

FAMILY = family_of("qwen2_vl")
SIZES = {"wide": (300, 90), "tall": (40, 333), "tiny": (3, 3), "large": (1200, 900)}
MODELS = {
    "qwen2_vl, tied, K 2 of 4, today's names, per picture": (
        {"model_type": "qwen2_vl", "tie_embeddings": True, "vision_heads": 3},
        {"layer": 2, "chooser": TopK(budget=Budget.PER_PICTURE)},
    ),
    "qwen2_vl, K 1 of 3, published names, shards, modern dialect": (
        {
            "model_type": "qwen2_vl",
            "old_layout": True,
            "layers": 3,
            "heads": 6,
            "head_dim": 20,
            "max_shard_size": 100_000,
            "seed": 5,
        },
        {"layer": 1, "dialect": Dialect.MODERN},
    ),
    "qwen2_5_vl, K 1 of 3, published names, shards": (
        {"old_layout": True, "layers": 3, "max_shard_size": 100_000, "seed": 2},
        {"layer": 1},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen")
    model, policy = MODELS[request.param]
    return FamilyPair(make_tiny(root / "checkpoint", **model), root / "bundle", **policy)


class TestAnswers(FamilyTests):
    prompts: ClassVar = {
        "text": [],
        "one": [tiny_picture(300, 90)],
        "two": [tiny_picture(60, 60), tiny_picture(40, 133, seed=1)],
        "video": [tiny_video(120, 90, frames=5, fps=1.5)],
        "picture, video, picture, video": [
            tiny_picture(60, 60),
            tiny_video(70, 120, frames=4, fps=29.97),
            tiny_picture(90, 60, seed=1),
            tiny_video(60, 60, frames=1, fps=0.2, seed=1),
        ],
    }
    shapes: ClassVar = [*(tiny_picture(*size) for size in SIZES.values()), *prompts["video"]]


@pytest.mark.parametrize("pair", list(MODELS)[1:2], indirect=True)
def test_the_bundle_answers_about_a_video_without_torch(pair, tmp_path):
    for i, frame in enumerate(tiny_video(120, 90, frames=3).frames):
        frame.save(tmp_path / f"{i}.png")
    pair.check_without_torch(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("qwen2-vl") / "checkpoint", model_type="qwen2_vl", seed=1)


@pytest.mark.parametrize("options", [{"old_layout": True}, {"old_layout": True, "max_shard_size": 100_000}])
def test_every_layout_of_names_opens_to_the_same_tensors(checkpoint, tmp_path, options):
    other = make_tiny(tmp_path / "other", model_type="qwen2_vl", seed=1, **options)
    assert open_checkpoint(str(other)).fingerprint == open_checkpoint(str(checkpoint)).fingerprint


def test_the_verbs_take_the_family(checkpoint, tmp_path):
    """Calibrate, build with validation, and run with a video, as a user would."""
    pictures, record, bundle = tmp_path / "pictures", tmp_path / "record.json", tmp_path / "bundle"
    pictures.mkdir()
    for i, size in enumerate([(112, 84), (84, 112)]):
        tiny_picture(*size, seed=i).save(pictures / f"{i}.png")
    for options in (
        ("calibrate", "--keep", "0.5", "--images", str(pictures), "--out", str(record)),
        ("plan", "--keep", "0.5", "--calibration", str(record), "--layer", "1", "--policy", "norm"),
        ("build", "--keep", "0.5", "--layer", "1", "--images", str(pictures), "--out", str(bundle)),
    ):
        done = ep_export(*options, "--model", str(checkpoint), "--json")
        assert done.code == 0, done.err
    assert json.loads(done.out)["validation"]["verdict"] in {"PASS", "AMBIGUOUS"}
    shown = ("--image", str(pictures / "0.png"), "--video", str(pictures), "--max-new-tokens", "2")
    done = ep_export("run", str(bundle), *shown, "--prompt", "What is this", "--json")
    # The folder holds a frame of each orientation.
    assert (done.code, "112 x 84" in done.err) == (1, True)
    (pictures / "1.png").unlink()
    done = ep_export("run", str(bundle), *shown, "--prompt", "What is this", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["visual_tokens"] == 24


def config(**text):
    shape = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section(16)},
    }
    return Qwen2VLConfig(text_config={**shape, **text})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, "sliding-window"),
        ({"num_key_value_heads": 4}, "4 kv heads"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "half the head dimension 32"),
    ],
)
def test_other_mathematics_is_refused(text, said):
    FAMILY.dims(config())
    with pytest.raises(UserError, match=said) as caught:
        FAMILY.dims(config(**text))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("alias", "shape"),
    [
        ("qwen2-vl-2b", (28, 1536, 12, 2, 128, 8960, 151936, 32768, 3)),
        ("Qwen/Qwen2-VL-7B-Instruct", (28, 3584, 28, 4, 128, 18944, 152064, 32768, 3)),
        ("qwen2-vl-72b", (80, 8192, 64, 8, 128, 29568, 152064, 32768, 3)),
    ],
)
def test_aliases_have_their_config_without_a_network(alias, shape):
    opened = open_config(alias)
    assert tuple(vars(opened.dims).values()) == shape
    assert FAMILY.default_visual_tokens(opened.config) == 23 * 17
    assert opened.config.tie_word_embeddings == (alias == "qwen2-vl-2b")
    assert opened.config.vision_config.hidden_size == opened.dims.hidden_size


def test_the_graphs_of_the_published_shape_hold_no_weights():
    """2 layers of the 7B model on `meta`."""
    config = open_config("qwen2-vl-7b").config
    config.text_config.num_hidden_layers = 2
    graphs = published_graphs(FAMILY, config)
    (patches,) = (name for name in stored_weights(graphs["vision_encoder"]) if "patch_embed" in name)
    assert np.prod(graphs["vision_encoder"].graph.initializers[patches].shape) > 10**6

"""Policies measured on the weights that will run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from command_line import ep_export
from published_layouts import publish
from tiny import make_tiny, tiny_picture

from ep_export.calibrate import calibrate, read_calibration
from ep_export.calibrate.weights import rounded_shard
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.policy import Keep
from ep_export.reference import load_model
from ep_export.weights.store import stored_layers

SETTINGS = {"keep": Keep(ratio=0.5), "layers": (1,), "max_images": 2, "max_new_tokens": 3}
FOUR = Weights(WeightKind.INT4, 32, "nearest")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    return open_checkpoint(str(make_tiny(path, vision_depth=1, vision_full_blocks=(0,))))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        tiny_picture(112, 84, seed=seed).save(folder / f"{seed}.png")
    return folder


def test_a_record_is_that_of_a_model_saved_with_the_dequantised_weights(checkpoint, images, tmp_path):
    pictures = [tiny_picture(112, 84, seed=seed) for seed in range(2)]
    questions = ["What is in the picture?"] * 2
    ours = calibrate(checkpoint, images, prompts=questions[:1], weights=FOUR, **SETTINGS)
    assert ours.weights == replace(FOUR, rounding="gptq")
    assert ours.fingerprint == checkpoint.fingerprint
    with rounded_shard(checkpoint, FOUR, pictures, questions) as shard:
        model = load_model(checkpoint, quantised=stored_layers([shard]))
    assert not shard.exists()
    make_tiny(tmp_path / "saved", vision_depth=1, vision_full_blocks=(0,))  # for its processor files
    model.save_pretrained(tmp_path / "saved")
    saved = open_checkpoint(str(tmp_path / "saved"))
    theirs = calibrate(saved, images, prompts=questions[:1], **SETTINGS)
    assert theirs.weights is None
    assert ours.query_entropy == pytest.approx(theirs.query_entropy, abs=1e-6)
    assert [c.kl for c in ours.candidates] == pytest.approx([c.kl for c in theirs.candidates], rel=1e-4)


def test_the_command_says_whether_rounding_changes_what_is_recommended(checkpoint, images, tmp_path):
    options = ("--images", str(images), "--keep", "0.5", "--layers", "1", "--max-images", "2")
    model = str(checkpoint.path)
    full, rounded = tmp_path / "tiny.json", tmp_path / "tiny-int8.json"
    said = ep_export("calibrate", "--model", model, *options, "--out", str(full))
    assert said.code == 0, said.err
    assert "with full weights" not in said.err
    said = ep_export("calibrate", "--model", model, *options, "--weights", "int8", "--out", str(rounded))
    assert said.code == 0, said.err
    assert read_calibration(rounded).weights == Weights(WeightKind.INT8, None, "gptq")
    same = read_calibration(rounded).recommended == read_calibration(full).recommended
    assert ("int8 weights do not change it" in said.err) == same
    assert ("another schedule is recommended" in said.err) != same


def test_a_checkpoint_that_is_quantised_is_measured_as_it_is(checkpoint, tmp_path):
    publish(checkpoint.path, tmp_path / "model", "awq")
    published = open_checkpoint(str(tmp_path / "model"))
    with pytest.raises(UserError, match="quantized already, by awq"), rounded_shard(published, FOUR):
        pass

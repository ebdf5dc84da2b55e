"""Rounded weights beside full ones: what is measured is Hugging Face's, and all says which they are."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import ep_export
from digit_scenes import make_scene
from published_layouts import publish
from tiny import make_tiny, tiny_picture

from ep_export.calibrate.weights import rounded_shard
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.measure.ways import one_cut
from ep_export.methods import find_methods
from ep_export.numerics import WeightKind, Weights
from ep_export.policy import Keep
from ep_export.reference import PruneSpec, greedy, load_model, prune
from ep_export.sweep import SweepOptions, read_sweep, sweep
from ep_export.sweep.recommended import Calibration
from ep_export.weights.store import stored_layers

QUESTION = "What is in the picture?"
FOUR = Weights(WeightKind.INT4, 32, "nearest")
WAY = one_cut(1, "norm-lowest", Keep(ratio=0.5))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    return open_checkpoint(str(make_tiny(path, vision_depth=1, vision_full_blocks=(0,))))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny_picture(112, 84, seed=0).save(folder / "0.png")
    return folder


@pytest.fixture(scope="module")
def done(checkpoint, images, tmp_path_factory):
    """(directory, what the command printed) of a sweep on full and int4 weights."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "prompts.json").write_text(json.dumps([QUESTION]))
    arguments = ["--keep", "0.5", "--layer", "1", "--methods", "norm-lowest,random", "--timed-prompts", "1"]
    said = ep_export(
        *("sweep", "--model", str(checkpoint.path), "--images", str(images)),
        *("--prompts", str(folder / "prompts.json"), "--out", str(folder / "out")),
        *(*arguments, "--weights", "none", "--weights", "int4", "--group", "32"),
    )
    assert said.code == 0, said.err
    return folder / "out", said


def test_everything_is_compared_with_the_unpruned_model_of_full_weights(checkpoint, done, images) -> None:
    record = read_sweep(done[0])
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    prompt = builder.build([tiny_picture(112, 84, seed=0)], QUESTION)
    full = load_model(checkpoint)
    answer = greedy(full, checkpoint.family, checkpoint.config, prompt, 32)
    fed = np.concatenate([prompt.input_ids, np.array([answer[:-1]], dtype=np.int64)], axis=1)
    inputs = checkpoint.family.reference_inputs(replace(prompt, input_ids=fed), checkpoint.config)

    def log_probs(model):
        with torch.inference_mode():
            return model(**inputs).logits[0, -len(answer) :].double().log_softmax(-1)

    def distance(other):
        return float((reference.exp() * (reference - other)).sum(-1).mean())

    reference = log_probs(full)
    with rounded_shard(checkpoint, FOUR) as shard:
        rounded = load_model(checkpoint, quantised=stored_layers([shard]))
    (unpruned,) = record.rounded
    assert (unpruned.name, unpruned.weights) == ("int4-32", FOUR)
    assert unpruned.kl.value == pytest.approx(distance(log_probs(rounded)), rel=1e-3)
    assert unpruned.kl.value > 1e-5
    for weights, model in ((None, full), ("int4-32", rounded)):
        row = next(r for r in record.rows if r.layer == 1 and r.weights == weights and "norm" in r.method)
        with prune(model, PruneSpec(WAY.schedule, WAY.keep)):
            pruned = log_probs(model)
        assert row.kl.value == pytest.approx(distance(pruned), rel=1e-3)
        same = (reference.argmax(-1) == pruned.argmax(-1)).double().mean()
        assert row.agreement.value == pytest.approx(float(same))


def test_rows_json_and_page_say_which_weights(done) -> None:
    out, said = done
    record = read_sweep(out)
    full = [row for row in record.rows if row.weights is None]
    rounded = [row for row in record.rows if row.weights == "int4-32"]
    assert [f"{row.method}@int4-32" for row in full] == [row.method for row in rounded]
    for one, other in zip(full, rounded, strict=True):
        assert (one.layer, one.cuts, one.kept_tokens, one.flops) == (
            (other.layer, other.cuts, other.kept_tokens, other.flops)
        )
        assert one.prefill is not None
        assert other.prefill is None  # of dequantised weights it would be the same
        assert one.over_full_weights is None
        assert other.over_full_weights.kl.value == pytest.approx(other.kl.value - one.kl.value)
        assert (other.over_random is None) == other.method.startswith("random")
    assert "int4-32 weights, rounded to the nearest, unpruned: KL" in said.out
    assert "Random, int4-32" in said.out
    assert "on full, int4-32 weights" in said.err
    assert "int4-32 weights, rounded to the nearest" in (out / "report.html").read_text()


def test_pictures_of_a_calibration_round_the_weights(checkpoint, images, tmp_path) -> None:
    (tmp_path / "pictures").mkdir()
    make_scene("calibration", index=0, seed=1, size=(112, 84)).picture.save(tmp_path / "pictures" / "0.png")
    options = SweepOptions(
        keeps=(0.5,),
        layers=(1,),
        methods=find_methods(("random",)),
        weights=(Weights(WeightKind.INT8, None, "nearest"), Weights(WeightKind.FP8, None, "nearest")),
        calibration=Calibration(images=tmp_path / "pictures", prompts=(QUESTION,)),
        seeds=1,
        timed_prompts=0,
        gallery_pictures=0,
        max_new_tokens=2,
    )
    record = sweep(checkpoint, images, [QUESTION], out=tmp_path / "out", options=options)
    assert [(one.name, one.weights.rounding) for one in record.rounded] == [
        ("int8", "gptq"),
        ("fp8", "nearest"),
    ]


def test_a_checkpoint_that_is_quantised_is_swept_as_it_is(checkpoint, images, tmp_path) -> None:
    publish(checkpoint.path, tmp_path / "model", "awq")
    published = open_checkpoint(str(tmp_path / "model"))
    options = SweepOptions(keeps=(0.5,), layers=(1,), methods=find_methods(("random",)), weights=(FOUR,))
    with pytest.raises(UserError, match="quantized already, by awq"):
        sweep(published, images, [QUESTION], out=tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()

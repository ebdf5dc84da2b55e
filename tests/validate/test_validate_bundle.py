"""A bundle against Hugging Face: what is right passes, what is broken fails at the stage that broke."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import make_tiny, tiny_picture

from ep_export.bundle import Bundle
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.policy import Scorer, Select
from ep_export.validate import Verdict, text_lines, to_json, validate

STAGES = [
    "positions",
    "vision",
    "embeddings",
    "scores",
    "node",
    "kept",
    "hidden",
    "logits",
    "kv_full",
    "kv_kept",
    "tokens",
]
PICTURES = [tiny_picture(140, 112, 1), tiny_picture(84, 168, 2)]
PROMPTS = ["which digits?"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def report(tiny_bundle, checkpoint):
    return validate(tiny_bundle, checkpoint, pictures=PICTURES, prompts=PROMPTS, max_new_tokens=6)


def verdicts(report):
    return {stage.name: stage.verdict for stage in report.stages}


def corrupted(bundle, checkpoint, tensor, tmp_path):
    """A copy of the bundle, one tensor in it 20% too large."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    ref = checkpoint.tensors[tensor]
    shards = [path for path in copy.rglob(ref.file.name) if path.suffix == ".safetensors"]
    assert len(shards) == 1
    content = bytearray(shards[0].read_bytes())
    values = np.frombuffer(content, dtype=np.float32, count=ref.length // 4, offset=ref.offset)
    values *= 1.2
    shards[0].write_bytes(content)
    return Bundle.open(copy, verify=False)


def test_a_true_bundle_passes_every_stage(report):
    assert [stage.name for stage in report.stages] == STAGES
    assert set(verdicts(report).values()) == {Verdict.PASS}
    assert report.verdict is Verdict.PASS
    assert report.kept_overlap == 1.0


def test_float32_tolerances_are_not_idle(report):
    """Errors use a fair part of what is allowed: a tolerance a thousand times too wide would show nothing."""
    for stage in report.stages:
        if stage.name in {"vision", "hidden", "logits", "kv_full", "kv_kept"}:
            assert 0.005 < stage.max_abs_error / stage.tolerance < 0.4, stage


def test_every_kind_of_prompt_was_asked(report):
    assert [case.name for case in report.cases] == ["question 1", "question 2", "two pictures", "no picture"]
    assert [len(case.pictures) for case in report.cases] == [1, 1, 2, 0]
    for case in report.cases:
        assert sum(sum(picture.kept) for picture in case.pictures) == case.kept_tokens
        assert case.answer == case.reference_answer
    assert report.cases[2].visual_tokens == report.cases[0].visual_tokens + report.cases[1].visual_tokens


def test_report_as_json_and_text(report):
    raw = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert raw["verdict"] == "PASS"
    assert raw["kept_overlap"] == 1.0
    assert [stage["name"] for stage in raw["stages"]] == STAGES
    assert {"name", "verdict", "max_abs_error", "tolerance", "reason"} <= set(raw["stages"][0])
    lines = text_lines(report)
    assert len(lines) == len(STAGES) + 2
    assert lines[-1].startswith("PASS: 11 stages over 4 prompts")


@pytest.mark.parametrize(
    ("tensor", "first", "untouched"),
    [
        (
            "model.visual.blocks.1.mlp.down_proj.weight",
            "vision",
            ["positions", "embeddings", "scores", "node"],
        ),
        ("model.language_model.embed_tokens.weight", "embeddings", ["vision", "scores", "node"]),
        ("model.language_model.layers.1.mlp.up_proj.weight", "hidden", ["vision", "kept", "kv_full"]),
        ("model.language_model.layers.0.self_attn.v_proj.weight", "kv_full", ["vision", "embeddings"]),
        ("model.language_model.layers.2.self_attn.k_proj.weight", "kv_kept", ["kept", "hidden", "kv_full"]),
        ("lm_head.weight", "logits", ["kept", "hidden", "kv_full", "kv_kept"]),
    ],
)
def test_a_corrupt_weight_fails_at_its_stage(tiny_bundle, checkpoint, tmp_path, tensor, first, untouched):
    broken = corrupted(tiny_bundle, checkpoint, tensor, tmp_path)
    report = validate(broken, checkpoint, pictures=PICTURES[:1], prompts=PROMPTS, max_new_tokens=2)
    found = verdicts(report)
    assert found[first] is Verdict.FAIL
    assert {found[name] for name in untouched} == {Verdict.PASS}
    assert report.verdict is Verdict.FAIL


@pytest.mark.parametrize("change", [{"scorer": Scorer.NORM}, {"select": Select.LOWEST}])
def test_a_node_that_does_other_than_the_manifest_says_fails_at_the_kept_set(tiny_bundle, checkpoint, change):
    policy = dataclasses.replace(tiny_bundle.manifest.policy, **change)
    lying = Bundle(tiny_bundle.path, dataclasses.replace(tiny_bundle.manifest, policy=policy))
    report = validate(lying, checkpoint, pictures=PICTURES[:1], prompts=PROMPTS, max_new_tokens=2)
    found = verdicts(report)
    assert found["node"] is found["kept"] is Verdict.FAIL
    # and nothing else is blamed: arithmetic is compared given the bundle's kept set
    assert {found[name] for name in STAGES if name not in {"node", "kept"}} == {Verdict.PASS}
    assert report.kept_overlap < 1


def test_half_precision_is_measured_against_the_models_own_rounding(half_bundle, checkpoint):
    report = validate(half_bundle, checkpoint, pictures=PICTURES[:1], prompts=PROMPTS, max_new_tokens=4)
    found = verdicts(report)
    assert found["kept"] is not Verdict.FAIL
    assert {found[name] for name in STAGES if name not in {"kept", "tokens"}} == {Verdict.PASS}
    by_name = {stage.name: stage for stage in report.stages}
    assert "own fp16 run" in by_name["hidden"].reason
    # far more than float32 would be allowed, and used: the measurement is of the right size
    assert 0.05 < by_name["hidden"].max_abs_error / by_name["hidden"].tolerance < 1


def test_equal_patches_are_a_near_tie_not_a_failure(half_bundle, checkpoint):
    """Every patch of a plain picture scores the same: which are kept is decided by rounding."""
    plain = Image.new("RGB", (168, 168), (120, 90, 60))
    report = validate(half_bundle, checkpoint, pictures=[plain], prompts=PROMPTS, max_new_tokens=2)
    found = verdicts(report)
    assert report.kept_overlap < 1
    assert found["kept"] is Verdict.AMBIGUOUS
    assert Verdict.FAIL not in found.values()
    assert report.verdict is Verdict.AMBIGUOUS


def test_another_checkpoint_is_refused(tiny_bundle, tmp_path):
    other = open_checkpoint(str(make_tiny(tmp_path / "other", seed=5)))
    with pytest.raises(UserError, match="another checkpoint"):
        validate(tiny_bundle, other, pictures=PICTURES, prompts=PROMPTS)


@pytest.mark.parametrize(("pictures", "prompts"), [([], PROMPTS), (PICTURES, [])])
def test_nothing_to_ask_is_refused(tiny_bundle, checkpoint, pictures, prompts):
    with pytest.raises(UserError, match="expected some"):
        validate(tiny_bundle, checkpoint, pictures=pictures, prompts=prompts)

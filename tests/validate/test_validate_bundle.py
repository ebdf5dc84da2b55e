"""A bundle against Hugging Face: what is right passes, what is broken fails at the stage that broke."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from bundles import export_tiny, two_cuts
from PIL import Image
from tiny import make_tiny, tiny_picture
from tiny_llava import make_tiny_llava
from tiny_video_llava import make_tiny_video_llava

from ep_export.bundle import Bundle
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.policy import MaxMin, Nothing, Random, Schedule, Scorer, Select, TopK
from ep_export.validate import Verdict, text_lines, to_json, validate

STAGES = [
    "preprocessing",
    "positions",
    "vision",
    "embeddings",
    "scores",
    "node",
    "kept",
    "hidden",
    "logits",
    "kv_0",
    "kv_1",
    "tokens",
]
TWO_CUTS = [
    "preprocessing",
    "positions",
    "vision",
    "embeddings",
    *("scores_0", "node_0", "kept_0", "hidden_0"),
    *("scores_1", "node_1", "kept_1", "hidden_1"),
    "logits",
    *("kv_0", "kv_1", "kv_2"),
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
        if stage.name in {"vision", "hidden", "logits", "kv_0", "kv_1"}:
            assert 0.005 < stage.max_abs_error / stage.tolerance < 0.4, stage


def test_every_kind_of_prompt_was_asked(report):
    names = [case.name for case in report.cases]
    assert names == ["question 1", "question 2", "two pictures", "a video", "no picture"]
    assert [len(case.pictures) for case in report.cases] == [1, 1, 2, 2, 0]
    for case in report.cases:
        assert sum(sum(picture.kept) for picture in case.pictures) == case.kept_tokens
        assert case.kept_by_cut == ((case.kept_tokens,) if case.pictures else ())
        assert case.answer == case.reference_answer
    assert [picture.picture for case in report.cases[:3] for picture in case.pictures] == [0, 1, 0, 1]
    assert [picture.video for picture in report.cases[3].pictures] == [0, 0]
    assert report.cases[2].visual_tokens == report.cases[0].visual_tokens + report.cases[1].visual_tokens


def test_report_as_json_and_text(report):
    raw = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert raw["verdict"] == "PASS"
    assert raw["kept_overlap"] == 1.0
    assert [stage["name"] for stage in raw["stages"]] == STAGES
    assert {"name", "verdict", "max_abs_error", "tolerance", "reason"} <= set(raw["stages"][0])
    lines = text_lines(report)
    assert len(lines) == len(STAGES) + 2
    assert lines[-1].startswith("PASS: 12 stages over 5 prompts")


@pytest.mark.parametrize(
    ("tensor", "first", "untouched"),
    [
        (
            "model.visual.blocks.1.mlp.down_proj.weight",
            "vision",
            ["positions", "embeddings", "scores", "node"],
        ),
        ("model.language_model.embed_tokens.weight", "embeddings", ["vision", "scores", "node"]),
        ("model.language_model.layers.1.mlp.up_proj.weight", "hidden", ["vision", "kept", "kv_0"]),
        ("model.language_model.layers.0.self_attn.v_proj.weight", "kv_0", ["vision", "embeddings"]),
        ("model.language_model.layers.2.self_attn.k_proj.weight", "kv_1", ["kept", "hidden", "kv_0"]),
        ("lm_head.weight", "logits", ["kept", "hidden", "kv_0", "kv_1"]),
    ],
)
def test_a_corrupt_weight_fails_at_its_stage(tiny_bundle, checkpoint, tmp_path, tensor, first, untouched):
    broken = corrupted(tiny_bundle, checkpoint, tensor, tmp_path)
    report = validate(broken, checkpoint, pictures=PICTURES[:1], prompts=PROMPTS, max_new_tokens=2)
    found = verdicts(report)
    assert found[first] is Verdict.FAIL
    assert {found[name] for name in untouched} == {Verdict.PASS}
    assert report.verdict is Verdict.FAIL


def lying(bundle, chooser, cut=0):
    """The bundle as it is, under a manifest that says another chooser of a cut."""
    manifest = bundle.manifest
    cuts = list(manifest.schedule.cuts)
    old = manifest.prune(cut, cuts[cut].chooser.name)
    cuts[cut] = dataclasses.replace(cuts[cut], chooser=chooser)
    components = [
        dataclasses.replace(each, chooser=chooser) if each is old else each for each in manifest.components
    ]
    return Bundle(
        bundle.path,
        dataclasses.replace(manifest, schedule=Schedule(tuple(cuts)), components=tuple(components)),
    )


@pytest.mark.parametrize(
    ("chooser", "wrong"),
    [
        (TopK(Scorer.NORM), {"scores", "node", "kept"}),
        (TopK(select=Select.LOWEST), {"node", "kept"}),
    ],
    ids=["norm", "lowest"],
)
def test_a_component_that_does_other_than_the_manifest_says_fails_there(
    tiny_bundle, checkpoint, chooser, wrong
):
    report = validate(
        lying(tiny_bundle, chooser), checkpoint, pictures=PICTURES[:1], prompts=PROMPTS, max_new_tokens=2
    )
    # nothing else is blamed: arithmetic is compared given the bundle's kept set
    assert {name for name, found in verdicts(report).items() if found is not Verdict.PASS} == wrong
    assert report.kept_overlap < 1


def test_a_component_whose_kept_index_is_not_what_it_gathers_fails(policies_bundle, checkpoint, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(policies_bundle.path, copy)
    file = copy / "prune_0.divprune.onnx"
    model = ir.load(file)
    (output,) = (value for value in model.graph.outputs if value.name == "kept_index")
    output.producer().op_type = "Neg"
    ir.save(model, file)
    bundle = Bundle(copy, policies_bundle.manifest)
    report = validate(
        bundle,
        checkpoint,
        pictures=PICTURES[:1],
        prompts=PROMPTS,
        policies=["divprune"],
        max_new_tokens=2,
    )
    found = verdicts(report)
    assert found["node"] is found["kept"] is Verdict.FAIL
    note = next(stage.note for stage in report.stages if stage.name == "kept")
    assert "missing, or positions are out of order" in note


@pytest.fixture(scope="module")
def policies_bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("policies") / "bundle"
    return export_tiny(tiny_checkpoint, out, layer=2, policies=(MaxMin(), Random(7), Nothing()))


@pytest.mark.parametrize("policy", ["divprune", "random-7", "nothing"])
def test_every_policy_of_a_bundle_can_be_validated(policies_bundle, checkpoint, policy):
    report = validate(
        policies_bundle,
        checkpoint,
        pictures=PICTURES[:1],
        prompts=PROMPTS,
        policies=[policy],
        max_new_tokens=2,
    )
    assert set(verdicts(report).values()) == {Verdict.PASS}
    assert report.policies == (policy,)
    assert f"pruned by {policy}" in report.sentence
    assert report.settings["evidence"].startswith("none for these policies")
    compared = {stage.name: stage.comparisons for stage in report.stages}
    assert (compared["scores"] > 0) == (policy != "nothing")


def test_a_policy_the_bundle_has_not_is_refused(policies_bundle, checkpoint):
    with pytest.raises(UserError, match="no policy 'norm-lowest'"):
        validate(policies_bundle, checkpoint, pictures=PICTURES, prompts=PROMPTS, policies=["norm-lowest"])


@pytest.fixture(scope="module")
def two_cut_bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("two-cuts") / "bundle"
    return export_tiny(tiny_checkpoint, out, schedule=two_cuts(0, 2, MaxMin(), TopK()), keep=0.45)


def test_every_cut_and_every_span_is_a_stage(tiny_checkpoint, checkpoint, tmp_path):
    bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", schedule=two_cuts(1, 3), keep=0.6)
    report = validate(bundle, checkpoint, pictures=PICTURES, prompts=PROMPTS, max_new_tokens=4)
    assert [stage.name for stage in report.stages] == TWO_CUTS
    assert set(verdicts(report).values()) == {Verdict.PASS}
    for case in report.cases:
        assert len(case.kept_by_cut) == (2 if case.visual_tokens else 0)
        for cut, kept in enumerate(case.kept_by_cut):
            assert sum(picture.masks[cut].sum() for picture in case.pictures) == kept
        assert all(a > b for a, b in itertools.pairwise((case.visual_tokens, *case.kept_by_cut)))


@pytest.mark.parametrize("cut", [0, 1])
def test_the_cut_that_keeps_others_is_the_one_that_fails(two_cut_bundle, checkpoint, cut):
    """The oracle follows the bundle at every cut, so that the other one is judged on what reaches it."""
    chooser = Random() if cut == 0 else TopK(select=Select.LOWEST)
    report = validate(
        lying(two_cut_bundle, chooser, cut),
        checkpoint,
        pictures=PICTURES[:1],
        prompts=PROMPTS,
        max_new_tokens=2,
    )
    failed = {name for name, found in verdicts(report).items() if found is not Verdict.PASS}
    assert failed == ({"scores_0", "node_0", "kept_0"} if cut == 0 else {"node_1", "kept_1"})


def test_an_encoder_for_videos_does_not_pass_unrun(tmp_path):
    source = make_tiny_video_llava(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(source))
    bundle = export_tiny(source, tmp_path / "video", layer=2)
    (name,) = {n for n in checkpoint.tensors if "video_tower" in n and n.endswith("layers.0.mlp.fc2.weight")}
    report = validate(
        corrupted(bundle, checkpoint, name, tmp_path),
        checkpoint,
        pictures=PICTURES[:1],
        prompts=PROMPTS,
        max_new_tokens=2,
    )
    stages = {stage.name: stage for stage in report.stages}
    assert stages["vision"].verdict is Verdict.FAIL
    assert "a video" in stages["vision"].note
    assert stages["embeddings"].verdict is Verdict.PASS


def test_a_family_without_videos_says_so(tmp_path):
    source = make_tiny_llava(tmp_path / "checkpoint")
    report = validate(
        export_tiny(source, tmp_path / "bundle", layer=2),
        open_checkpoint(str(source)),
        pictures=PICTURES[:1],
        prompts=PROMPTS,
        max_new_tokens=2,
    )
    assert report.verdict is Verdict.PASS
    assert [case.name for case in report.cases] == ["question 1", "no picture"]
    assert report.settings["video"] == "family llava takes no videos"


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

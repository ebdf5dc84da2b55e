"""The verbs as a user and a script meet them, on a tiny checkpoint."""

import json

import pytest
from command_line import ep_export
from tiny import tiny_picture

from ep_export.bundle import read_manifest
from ep_export.validate import Verdict


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate([(112, 84), (84, 112), (140, 56)]):
        tiny_picture(*size, seed=i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def built(tiny_checkpoint, pictures, tmp_path_factory):
    """The main job: (result, bundle)."""
    out = tmp_path_factory.mktemp("built") / "bundle"
    options = ("--keep", "0.5", "--layer", "1", "--images", str(pictures), "--out", str(out), "--json")
    return ep_export("build", "--model", str(tiny_checkpoint), *options), out


def test_build_writes_a_validated_bundle(built):
    result, out = built
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["bundle"] == str(out)
    assert said["validation"]["verdict"] in {"PASS", "AMBIGUOUS"}
    assert {stage["name"] for stage in said["validation"]["stages"]} >= {"vision", "kept", "logits", "tokens"}
    assert "nothing measured it on this model" in result.err  # the evidence is always printed
    assert (out / "report" / "report.html").is_file()


def test_a_build_found_different_replaces_no_earlier_bundle(tiny_checkpoint, pictures, tmp_path, monkeypatch):
    out = tmp_path / "bundle"
    verb = (
        "build",
        "--model",
        str(tiny_checkpoint),
        "--keep",
        "0.5",
        "--layer",
        "1",
        "--images",
        str(pictures),
    )
    assert ep_export(*verb, "--out", str(out)).code == 0
    good = read_manifest(out)
    with monkeypatch.context() as patch:
        patch.setattr("ep_export.validate.report.Report.verdict", Verdict.FAIL)
        failed = ep_export(*verb, "--out", str(out), "--overwrite")
        first = ep_export(*verb, "--out", str(tmp_path / "first"))
    assert (failed.code, failed.out.strip()) == (3, str(tmp_path / "bundle.failed")), failed.err
    assert f"{out} is still the earlier bundle" in failed.err
    assert read_manifest(out) == good
    assert read_manifest(tmp_path / "bundle.failed").components == good.components
    assert (first.code, first.out.strip()) == (3, str(tmp_path / "first"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bundle", "bundle.failed", "first"]


def test_run_answers_and_draws(built, pictures, tmp_path):
    _, bundle = built
    shown = tmp_path / "kept.png"
    image = ("--image", str(pictures / "0.png"))
    result = ep_export(
        "run", str(bundle), *image, "--prompt", "What is this", "--max-new-tokens", "3", "--show", str(shown)
    )
    assert result.code == 0, result.err
    assert "visual tokens" in result.err
    assert shown.is_file()


def test_run_json_has_what_scripts_read(built, pictures):
    _, bundle = built
    images = ("--image", str(pictures / "0.png"), "--image", str(pictures / "1.png"))
    result = ep_export(
        "run", str(bundle), *images, "--prompt", "What is this", "--max-new-tokens", "3", "--json"
    )
    said = json.loads(result.out)
    assert {"answer", "token_ids", "prompt_tokens", "visual_tokens", "kept_index", "timings_ms"} <= set(said)
    assert said["visual_tokens"] == 24
    assert len(said["kept_index"]) < said["prompt_tokens"]


def test_run_keep_overrides_the_bundles(built, pictures):
    _, bundle = built
    ask = (
        "run",
        str(bundle),
        "--image",
        str(pictures / "0.png"),
        "--prompt",
        "What",
        "--max-new-tokens",
        "1",
        "--json",
    )
    full, pruned = (json.loads(ep_export(*ask, "--keep", keep).out) for keep in ("1", "0.5"))
    assert len(full["kept_index"]) == full["prompt_tokens"]
    assert len(pruned["kept_index"]) < pruned["prompt_tokens"]


def test_a_policy_is_added_without_touching_anything_else(built, pictures):
    _, bundle = built

    def checksums():
        return {entry.path: entry.sha256 for entry in read_manifest(bundle).files}

    before = checksums()
    result = ep_export("policy", "add", str(bundle), "--policy", "divprune", "--policy", "norm-lowest")
    assert (result.code, result.out.split()) == (0, ["divprune", "norm-lowest"]), result.err
    after = checksums()
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {"prune_0.divprune.onnx", "prune_0.norm-lowest.onnx"}
    listed = json.loads(ep_export("policy", "list", str(bundle), "--json").out)
    assert listed["policies"] == ["paper-highest", "divprune", "norm-lowest"]
    image = ("--image", str(pictures / "0.png"), "--prompt", "What", "--max-new-tokens", "1", "--json")
    kept = {
        name: json.loads(ep_export("run", str(bundle), *image, "--policy", name).out)["kept_index"]
        for name in listed["policies"]
    }
    assert len({len(index) for index in kept.values()}) == 1
    assert len({tuple(index) for index in kept.values()}) == 3
    validated = ep_export("validate", str(bundle), "--images", str(pictures), "--policy", "divprune")
    assert validated.code == 0, validated.err


def test_two_cuts_from_plan_to_picture(tiny_checkpoint, pictures, tmp_path):
    out, shown = tmp_path / "bundle", tmp_path / "kept.png"
    cuts = ("--cut", "1:0.75:divprune", "--cut", "3:50%:norm-lowest")
    planned = json.loads(ep_export("plan", "--model", str(tiny_checkpoint), *cuts, "--json").out)
    assert [cut["policy"] for cut in planned["cuts"]] == ["divprune", "norm-lowest"]
    assert planned["keep"] == pytest.approx((1 + 2 * 0.75 + 0.5) / 4)
    result = ep_export(
        "build", "--model", str(tiny_checkpoint), *cuts, "--out", str(out), "--images", str(pictures)
    )
    assert result.code == 0, result.err
    image = ("--image", str(pictures / "0.png"), "--prompt", "What", "--max-new-tokens", "1", "--json")
    said = json.loads(ep_export("run", str(out), *image, "--show", str(shown)).out)
    visual, text = said["visual_tokens"], said["prompt_tokens"] - said["visual_tokens"]
    assert [len(cut["kept_index"]) - text for cut in said["cuts"]] == [visual * 3 // 4, visual // 2]
    first, second = (set(cut["kept_index"]) for cut in said["cuts"])
    assert second < first
    assert set(said["kept_index"]) == second
    assert shown.is_file()


def test_inspect_shows_shapes_and_what_was_verified(built):
    _, bundle = built
    result = ep_export("inspect", str(bundle))
    assert result.code == 0
    assert "[1, S, 64]" in result.out
    assert "verified: onnxruntime-cpu" in result.out


def test_validate_again_gives_the_same_verdict(built, pictures, tmp_path):
    result, bundle = built
    again = ep_export(
        "validate", str(bundle), "--images", str(pictures), "--report", str(tmp_path / "report"), "--json"
    )
    assert again.code == 0, again.err
    assert json.loads(again.out)["verdict"] == json.loads(result.out)["validation"]["verdict"]
    assert (tmp_path / "report" / "report.html").is_file()


def test_validate_a_different_model_is_exit_3_or_refused(built, tmp_path):
    from tiny import make_tiny

    _, bundle = built
    other = make_tiny(tmp_path / "other", seed=9)
    result = ep_export("validate", str(bundle), "--model", str(other))
    assert result.code == 1
    assert "another checkpoint" in result.err


def test_calibrate_writes_a_record_and_a_plot_and_build_uses_it(tiny_checkpoint, pictures, tmp_path):
    record = tmp_path / "record.json"
    options = ("--images", str(pictures), "--keep", "0.5", "--out", str(record))
    result = ep_export("calibrate", "--model", str(tiny_checkpoint), *options)
    assert result.code == 0, result.err
    raw = json.loads(record.read_text())
    assert raw["provenance"]["kind"] == "measured"
    assert {c["layer"] for c in raw["candidates"]} == {0, 1, 2}  # DivPrune also before the decoder
    assert record.with_suffix(".png").is_file()

    told = ("--calibration", str(record), "--policy", "norm", "--layer", "1", "--json")
    plan = ep_export("plan", "--model", str(tiny_checkpoint), "--keep", "0.5", *told)
    assert plan.code == 0, plan.err
    assert json.loads(plan.out)["ecl"] == 1


def test_plan_from_an_alias_needs_no_checkpoint():
    result = ep_export(
        "plan", "--model", "qwen2.5-vl-7b", "--keep", "0.25", "--visual-tokens", "1296", "--json"
    )
    said = json.loads(result.out)
    assert (said["layers"], said["ecl"]) == (28, 1)
    assert said["kept_visual_tokens"] == 288  # 22.22% of 1296, as the published script keeps
    assert said["prefill_flops"]["pruned"] < said["prefill_flops"]["full"]


def test_models_lists_aliases_with_provenance():
    result = ep_export("models", "--json")
    models = json.loads(result.out)["models"]
    known = {model["alias"]: model for model in models}
    assert known["qwen2.5-vl-7b"]["ecl"] == 1
    assert known["qwen2.5-vl-7b"]["provenance"] == "published"

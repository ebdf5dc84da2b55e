"""verify.sh: real Polygraphy with ONNX Runtime, and the calls it would make where TensorRT is.

TensorRT itself is a stand-in here: no GPU.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import export_tiny, two_cuts
from kit_device import JETPACK6, Device, make_kit
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import load_json, save_json
from polygraphy.tools.run import Run

from ep_export.bundle import Precision
from ep_export.choosers import CutTokens, KeptDifference, choose, difference
from ep_export.choosers.coverage import weighted_rows
from ep_export.choosers.top_k import kept_difference, picture_of, select_tokens
from ep_export.data import data_dir
from ep_export.policy import Budget, Coverage, MaxMin, Nothing, Random, Scorer, Select, Source, TopK
from ep_export.runtime.bfloat16 import narrow, widen

PRUNE = "prune_0.paper-highest"

_SITE = """
# A stand-in for TensorRT and for Polygraphy's command: it records and gives back the golden outputs.
import json, os, shutil, sys, types

def record(kind, *values):
    with open(os.environ["STANDIN_CALLS"], "a") as calls:
        calls.write(json.dumps([kind, *values]) + "\\n")

def main():
    arguments = sys.argv[1:]
    record("polygraphy", *arguments)
    if "--save-outputs" in arguments:
        case = os.path.basename(os.environ["KIT_INPUTS"]).replace("inputs", "outputs")
        shutil.copyfile("golden/" + case, arguments[arguments.index("--save-outputs") + 1])
    return 0

registry = types.SimpleNamespace(load_library=lambda path: record("load_library", path))
tensorrt = types.ModuleType("tensorrt")
tensorrt.get_plugin_registry = lambda: registry
tools = types.ModuleType("polygraphy.tools")
tools.main = main
sys.modules.update({"tensorrt": tensorrt, "polygraphy.tools": tools})
"""


@pytest.fixture(scope="module")
def golden_kit(tiny_bundle, tmp_path_factory):
    return make_kit(tiny_bundle, tmp_path_factory.mktemp("kit") / "kit", golden=True)


@pytest.fixture
def kit(golden_kit, tmp_path):
    return Path(shutil.copytree(golden_kit, tmp_path / "moved kit"))


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path / "device", environment={"PYTHON": sys.executable})


def device_script(name: str):
    """A helper of the kit as a module."""
    spec = importlib.util.spec_from_file_location(name, data_dir("engines") / "kit" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resum(kit: Path, name: str) -> None:
    """Somebody changed a file and its checksum."""
    lines = (kit / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((kit / name).read_bytes()).hexdigest()
    told = [f"{digest}  {name}" if line.endswith(f"  {name}") else line for line in lines]
    (kit / "SHA256SUMS").write_text("\n".join(told) + "\n")


def test_polygraphy_reads_the_golden_files_and_onnx_runtime_agrees_with_them(kit, device):
    result = device.run(kit, "verify.sh", "--onnxrt")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["PASS"] * 6
    assert all("of the allowed difference" in line for line in lines[:-1])
    assert "32 of 64 visual tokens kept, all of them PyTorch's" in result.stdout
    assert lines[-1].startswith("PASS: the ONNX files in ONNX Runtime compute PyTorch's outputs")


def test_half_precision_agrees_within_what_pytorch_itself_loses(tiny_checkpoint, tmp_path, device):
    kits = {}
    for precision in (Precision.FP16, Precision.BF16):
        bundle = export_tiny(tiny_checkpoint, tmp_path / precision.value, layer=2, precision=precision)
        kits[precision] = make_kit(bundle, tmp_path / f"{precision.value}-kit", golden=True)
    half, brain = (
        load_json(str(kit / "golden" / "decoder_1.prefill.inputs.json"))[0]["inputs_embeds"]
        for kit in kits.values()
    )
    assert half.dtype == np.float16
    assert brain.dtype == np.float32
    assert np.array_equal(widen(narrow(brain)).reshape(brain.shape), brain)
    allowed = [
        float(re.search(r"^logits:(.*)$", text, re.MULTILINE)[1])
        for kit in kits.values()
        if (text := (kit / "golden" / "decoder_1.prefill.tolerances").read_text())
    ]
    assert 0 < allowed[0] < allowed[1]
    assert "torch" in (kits[Precision.BF16] / "README.md").read_text()
    result = device.run(
        kits[Precision.FP16],
        "verify.sh",
        "--onnxrt",
        "--case",
        f"{PRUNE}.prefill",
        "--case",
        "decoder_1.decode",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 3
    refused = device.run(kits[Precision.BF16], "verify.sh", "--onnxrt")
    assert "error: ONNX Runtime computes no bfloat16 on a CPU" in refused.stderr
    (run,) = run_with_standins(kits[Precision.BF16], device, "--case", "vision_encoder.all")
    assert run[run.index("--data-loader-script") + 1] == "kit/load_inputs.py"
    assert "--load-inputs" not in run


def test_outputs_that_differ_fail_with_3_and_name_the_output(kit, device):
    file = kit / "golden" / "decoder_1.decode.outputs.json"
    results = RunResults.load(str(file))
    results[0][1][0]["logits"] = results[0][1][0]["logits"] + np.float32(0.01)
    results.save(str(file))
    resum(kit, "golden/decoder_1.decode.outputs.json")
    result = device.run(kit, "verify.sh", "--onnxrt", "--case", "decoder_1.decode")
    assert result.returncode == 3
    assert "FAIL      decoder_1.decode" in result.stdout
    assert "Mismatched outputs: ['logits']" in result.stdout


def test_another_kept_set_fails_with_3(kit, device):
    file = kit / "golden" / f"{PRUNE}.prefill.choice.json"
    choice = load_json(str(file))
    (inputs,) = load_json(str(kit / "golden" / f"{PRUNE}.prefill.inputs.json"))
    choice["kept"] = np.setdiff1d(inputs["visual_index"], choice["kept"])
    save_json(choice, str(file))
    resum(kit, f"golden/{PRUNE}.prefill.choice.json")
    result = device.run(kit, "verify.sh", "--onnxrt", "--case", f"{PRUNE}.prefill")
    assert result.returncode == 3
    assert "32 of 32 kept tokens differ, by more than near-ties" in result.stdout


def test_an_engine_that_cannot_be_run_is_an_error_not_a_difference(kit, device):
    (kit / "decoder_1.onnx").unlink()
    (kit / "decoder_1.onnx").write_text("no model")
    resum(kit, "decoder_1.onnx")
    result = device.run(kit, "verify.sh", "--onnxrt", "--case", "decoder_1.decode")
    assert result.returncode == 1
    assert "ERROR     decoder_1.decode" in result.stdout


def test_without_tensorrt_or_engines_it_says_what_is_missing(kit, device):
    result = device.run(kit, "verify.sh")
    assert result.returncode == 1
    assert "has no module tensorrt" in result.stderr
    (device.folder / "site").mkdir()
    (device.folder / "site" / "sitecustomize.py").write_text(_SITE)
    result = device.run(kit, "verify.sh", PYTHONPATH=str(device.folder / "site"))
    assert result.returncode == 1
    assert "error: the engines are not all built" in result.stderr


def polygraphys_parser() -> argparse.ArgumentParser:
    """Of the real `polygraphy run`: its stand-in takes any arguments."""
    parser = argparse.ArgumentParser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Polygraphy 0.53 reads entry points the old way
        Run().setup_parser(parser.add_subparsers())
    return parser


def run_with_standins(kit: Path, device: Device, *arguments: str) -> list[list[str]]:
    """Build and verify without --onnxrt; returns Polygraphy's arguments of every run."""
    site = device.folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE)
    assert device.run(kit, "build.sh").returncode == 0
    (device.folder / "calls").unlink()
    result = device.run(kit, "verify.sh", *arguments, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stdout + result.stderr
    calls = [json.loads(line) for line in (device.folder / "calls").read_text().splitlines()]
    library = (kit / "engines" / JETPACK6 / "libep_entropy_prune.so").resolve()
    runs = [call[1:] for call in calls if call[0] == "polygraphy"]
    for run in runs:
        polygraphys_parser().parse_args(run)  # which ends the test where the real one refuses
    assert [call[1] for call in calls if call[0] == "load_library"] == [str(library)] * len(runs)
    return runs


def test_on_the_device_every_engine_runs_under_its_profile_with_the_plugin_registered(kit, device):
    runs = run_with_standins(kit, device)
    compared = [run for run in runs if "--load-outputs" in run]
    assert len(runs) == 7  # what the device keeps is looked at before it is compared
    assert [(run[1], run[run.index("--optimization-profile") + 1]) for run in compared] == [
        (f"engines/{JETPACK6}/vision_encoder.engine", "0"),
        (f"engines/{JETPACK6}/decoder_0.engine", "0"),
        (f"engines/{JETPACK6}/decoder_0.engine", "1"),
        (f"engines/{JETPACK6}/{PRUNE}.engine", "0"),
        (f"engines/{JETPACK6}/decoder_1.engine", "0"),
        (f"engines/{JETPACK6}/decoder_1.engine", "1"),
    ]
    for run in compared:
        assert run[0] == "run"
        assert run[run.index("--rtol") + 1] == "0"
        assert run[run.index("--check-error-stat") + 1] == "max"
    assert compared[-1][compared[-1].index("--atol") + 1].startswith("logits:")


def test_an_engine_changed_after_the_build_is_refused(kit, device):
    (device.folder / "site").mkdir()
    (device.folder / "site" / "sitecustomize.py").write_text(_SITE)
    device.run(kit, "build.sh")
    for name in ("decoder_0.engine", "libep_entropy_prune.so"):
        file = kit / "engines" / JETPACK6 / name
        content = file.read_text()
        file.write_text("another one")
        result = device.run(kit, "verify.sh", PYTHONPATH=str(device.folder / "site"))
        assert result.returncode == 1
        assert f"{name} is missing or was changed since it was built" in result.stderr
        file.write_text(content)


class TestEveryPolicy:
    """Golden files and judgement of whatever a bundle holds, at two cuts."""

    POLICIES = (
        TopK(Scorer.NORM, Select.LOWEST, Source.KEY),
        TopK(source=Source.HIDDEN),
        Random(3),
        Nothing(),
    )

    def test_onnx_runtime_passes_all_of_them(self, tiny_checkpoint, tmp_path, device):
        bundle = export_tiny(
            tiny_checkpoint,
            tmp_path / "bundle",
            schedule=two_cuts(1, 2, MaxMin(), TopK()),
            keep=0.6,
            policies=self.POLICIES[:3],
        )
        names = [chooser.name for chooser in self.POLICIES[:3]]
        kit = make_kit(bundle, tmp_path / "kit", golden=True, policies=names)
        result = device.run(kit, "verify.sh", "--onnxrt")
        assert result.returncode == 0, result.stdout + result.stderr
        cases = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines()[:-1]}
        assert {f"prune_{cut}.{name}.prefill" for cut in range(2) for name in names} <= set(cases)
        assert {"prune_0.divprune.prefill", "prune_1.paper-highest.prefill"} <= set(cases)
        assert "decoder_2.decode" in cases
        assert set(cases.values()) <= {"PASS", "AMBIGUOUS"}

    def test_a_cut_that_drops_every_visual_token(self, tiny_checkpoint, tmp_path, device):
        bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", chooser=Nothing(), keep=0.25)
        kit = make_kit(bundle, tmp_path / "kit", golden=True)
        result = device.run(kit, "verify.sh", "--onnxrt", "--case", "prune_0.nothing.prefill")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "0 of 64 visual tokens kept" in result.stdout


def test_the_device_judges_scores_as_ep_export_does():
    """Against ep_export.choosers, on random scores with many near-ties."""
    judge = device_script("check_choice")
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        index = np.sort(random.choice(60, size=24, replace=False))
        scores = np.round(random.normal(size=24), 1)
        select = (Select.HIGHEST, Select.LOWEST)[random.integers(2)]
        budget = (Budget.JOINT, Budget.PER_PICTURE)[random.integers(2)]
        k = int(random.integers(1, 24))
        own = select_tokens(scores, k, select=select, visual_index=index, budget=budget)
        noisy = scores + random.normal(scale=0.04, size=24)
        other = select_tokens(noisy, k, select=select, visual_index=index, budget=budget)
        tolerance = float(random.choice([0.05, 0.15, 0.3]))
        wanted = kept_difference(
            scores, own, other, k, visual_index=index, select=select, budget=budget, tolerance=tolerance
        )
        if wanted is KeptDifference.EQUAL:
            continue
        choice = {
            "kind": "top_k",
            "scores": scores,
            "kept": own,
            "pictures": picture_of(index) if budget is Budget.PER_PICTURE else np.zeros_like(index),
            "select": select.value,
            "tolerance": tolerance,
        }
        inputs = {"visual_index": index}
        assert judge.near_tie(choice, inputs, other) == (wanted is KeptDifference.NEAR_TIE)
        seen.add(wanted)
    assert seen == {KeptDifference.NEAR_TIE, KeptDifference.DIFFERENT}


@pytest.mark.parametrize("chooser", [MaxMin(), Coverage(Scorer.NORM)], ids=str)
def test_the_device_judges_distances_as_ep_export_does(chooser):
    """Against ep_export.choosers, on tokens of few directions, which are full of near-ties."""
    judge = device_script("check_choice")
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(150):
        index = np.sort(random.choice(40, size=16, replace=False))
        hidden = np.zeros((1, 40, 4))
        hidden[0, index] = np.round(random.normal(size=(16, 4)))
        k, tolerance = int(random.integers(1, 15)), float(random.choice([1e-6, 0.1, 0.4]))
        sizes = torch.from_numpy(np.round(random.normal(size=(16, 2, 3))))
        exact = CutTokens(torch.from_numpy(hidden[0, index]), sizes, torch.from_numpy(index))
        shaken = CutTokens(
            exact.hidden + torch.from_numpy(random.normal(scale=0.05, size=(16, 4))),
            sizes,
            exact.visual_index,
        )
        other = choose(chooser, shaken, k).kept
        if random.integers(4) == 0:
            other = torch.from_numpy(np.sort(random.choice(index, size=k, replace=False)))
        wanted = difference(chooser, exact, other, k, tolerance=tolerance)
        seen.add(wanted)
        if wanted is KeptDifference.EQUAL:
            continue
        kept = choose(chooser, exact, k).kept.numpy()
        choice = {"kind": chooser.kind.value, "kept": kept, "tolerance": tolerance}
        if isinstance(chooser, Coverage):
            rows, first = weighted_rows(chooser, exact)
            choice["weights"] = torch.where(rows.finite, first, 0.0).numpy()
        inputs = {"visual_index": index, "hidden": hidden}
        assert judge.near_tie(choice, inputs, other.numpy()) == (wanted is KeptDifference.NEAR_TIE)
    assert seen == set(KeptDifference)


@pytest.mark.parametrize("kind", ["random", "nothing"])
def test_a_draw_has_no_near_ties(kind):
    choice = {"kind": kind, "kept": np.array([2]), "tolerance": 1e9}
    inputs = {"visual_index": np.array([2, 3]), "hidden": np.ones((1, 5, 2))}
    assert not device_script("check_choice").near_tie(choice, inputs, np.array([3]))


def save_results(file: Path, outputs: dict) -> None:
    RunResults([("a run", [IterationResult(outputs=outputs, runner_name="a run")])]).save(str(file))


@pytest.fixture
def choice(tmp_path):
    """Six positions, 1 to 4 visual, two kept; tokens 2 and 3 score almost the same."""
    judged = {
        "kind": "top_k",
        "scores": np.array([3.0, 2.0, 2.0 - 1e-7, 1.0]),
        "kept": np.array([1, 2]),
        "pictures": np.zeros(4, dtype=np.int64),
        "select": "highest",
        "tolerance": 1e-6,
    }
    hidden = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    inputs = {
        "hidden": hidden,
        "position_ids": 10 + np.arange(6).reshape(1, 1, 6),
        "visual_index": np.array([1, 2, 3, 4]),
    }
    save_json(judged, str(tmp_path / "choice.json"))
    save_json([inputs], str(tmp_path / "inputs.json"))
    golden = {"kept_hidden": hidden[:, [0, 1, 2, 5]], "scores": judged["scores"].astype(np.float32)}
    save_results(tmp_path / "golden.json", golden)
    return tmp_path


def judged(folder: Path, kept: list[int]) -> tuple[int, str]:
    save_results(folder / "got.json", {"kept_index": np.array(kept), "scores": np.full(4, 7.0, np.float32)})
    names = ("choice.json", "inputs.json", "golden.json", "got.json", "wanted.json")
    return device_script("check_choice").judge(*(str(folder / name) for name in names))


def wanted_of(folder: Path) -> dict:
    return RunResults.load(str(folder / "wanted.json"))[0][1][0]


def test_after_a_near_tie_the_rows_the_device_kept_are_wanted(choice):
    assert judged(choice, [0, 1, 3, 5]) == (0, "2 of 4 visual tokens kept, 1 of them by a near-tie")
    wanted = wanted_of(choice)
    assert wanted["kept_hidden"][0, :, 0].tolist() == [0, 2, 6, 10]
    assert wanted["kept_position_ids"].ravel().tolist() == [10, 11, 13, 15]
    assert wanted["kept_index"].tolist() == [0, 1, 3, 5]
    assert wanted["kept_visual_index"].tolist() == [1, 2]  # which of the four rows are visual
    assert wanted["scores"].tolist() == pytest.approx([3, 2, 2, 1])


def test_after_a_near_tie_of_distances_their_own_are_wanted(choice):
    """What a token's distance is measured to is another token then."""
    file = choice / "choice.json"
    save_json({**load_json(str(file)), "kind": "max_min", "tolerance": 9.0}, str(file))
    assert judged(choice, [0, 1, 3, 5])[0] == 0
    assert wanted_of(choice)["scores"].tolist() == [7.0] * 4
    assert judged(choice, [0, 1, 2, 5])[0] == 0
    assert wanted_of(choice)["scores"].tolist() == pytest.approx([3, 2, 2, 1])


@pytest.mark.parametrize(
    ("kept", "complaint"),
    [
        ([0, 1, 4, 5], "1 of 2 kept tokens differ, by more than near-ties"),
        ([0, 1, 2], "1 text tokens were dropped"),
        ([0, 1, 2, 3, 5], "3 visual tokens were kept, expected 2"),
        ([0, 2, 1, 5], "kept positions are out of order, repeated or outside the prompt"),
        ([0, 1, 2, 9], "kept positions are out of order, repeated or outside the prompt"),
    ],
)
def test_a_wrong_kept_set_is_told_in_words(choice, kept, complaint):
    assert judged(choice, kept) == (3, complaint)


def test_bfloat16_inputs_become_pytorch_tensors(tmp_path, monkeypatch):
    exact = np.array([[1.5, -0.0078125]], dtype=np.float32)
    file = tmp_path / "inputs.json"
    save_json([{"hidden_states": exact, "position_ids": np.array([7])}], str(file))
    monkeypatch.setenv("KIT_INPUTS", str(file))
    (feeds,) = device_script("load_inputs").load_data()
    assert feeds["hidden_states"].dtype == torch.bfloat16
    assert np.array_equal(feeds["hidden_states"].float().numpy(), exact)
    assert feeds["position_ids"].dtype == torch.int64

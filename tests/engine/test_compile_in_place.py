"""TensorRT targets: compiled where their GPU is, else a kit.

There is no GPU here. The GPU, TensorRT and its compiler are stand-ins; tested is what they are asked for.
"""

import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from ep_export.bundle import Bundle
from ep_export.engine import compile as compiling
from ep_export.engine.compile import CompileRequest, Made, compile_bundle
from ep_export.engine.device import Gpu
from ep_export.engine.profiles import LimitsRequest
from ep_export.engine.worker import Outcome
from ep_export.engine_record import RECORD, read_record
from ep_export.errors import UserError
from ep_export.targets import Flavour, find_target

ORIN = Gpu("Orin", "8.7", 64 << 30)
LIMITS = LimitsRequest(max_prompt=256, max_new_tokens=32, max_pixels=50_176)


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture
def device(monkeypatch):
    """A Jetson as far as this code can tell: its GPU, TensorRT and a compiler that writes its job down."""
    jobs = {}

    def compile_component(job, *, component, target):
        jobs[component] = job
        head = ir.load(job.onnx)
        Path(job.engine).write_bytes(component.encode())
        jobs[component + " functions"] = [name for _, name, _ in head.functions]
        return Outcome(len(component), 1.0, "10.3.0")

    def pretend(gpu=ORIN, version="10.3.0"):
        monkeypatch.setattr(compiling, "find_gpu", lambda: gpu)
        monkeypatch.setattr(compiling, "installed_version", lambda _flavour: version)
        monkeypatch.setattr(compiling, "require_compiler", lambda _target: version)
        monkeypatch.setattr(compiling, "compile_component", compile_component)
        return jobs

    return pretend


def test_a_matching_gpu_compiles_in_place(bundle, device):
    jobs = device()
    result = compile_bundle(bundle, CompileRequest(find_target("jetson-orin-agx-64gb"), LIMITS))
    assert result.made is Made.ENGINES
    record = read_record(result.directory)
    assert (record.flavour, record.sm, record.version, record.plugin) == (
        Flavour.TENSORRT,
        "8.7",
        "10.3.0",
        False,
    )
    assert jobs["decoder_head"].flavour is Flavour.TENSORRT
    assert jobs["decoder_head functions"] == ["EntropyPrune"]  # no plugin: the body is compiled
    Bundle.open(bundle.path)  # its manifest lists the engines


def test_with_a_plugin_tensorrt_10_3_gets_no_body_and_no_trace_of_it_stays(bundle, device, tmp_path):
    jobs = device()
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"")
    request = CompileRequest(find_target("jetson-orin-agx-64gb"), LIMITS, plugin=plugin)
    result = compile_bundle(bundle, request)
    assert result.record.plugin
    assert jobs["decoder_head functions"] == []
    assert jobs["decoder_head"].plugin == str(plugin)
    assert not list(bundle.path.glob(".*"))


def test_tensorrt_11_keeps_the_body_beside_the_plugin(bundle, device, tmp_path):
    jobs = device(version="11.4.1")
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"")
    target = find_target("jetson-orin-agx-64gb-jetpack7")
    compile_bundle(bundle, CompileRequest(target, LIMITS, plugin=plugin))
    assert jobs["decoder_head functions"] == ["EntropyPrune"]


@pytest.mark.parametrize(
    ("gpu", "version", "why"),
    [
        (None, "10.3.0", "this machine has no GPU"),
        (Gpu("A100", "8.0", 1), "10.3.0", "a GPU of SM 8.0"),
        (ORIN, None, "TensorRT is not installed"),
        (ORIN, "10.8.0", "TensorRT here is 10.8.0"),
    ],
)
def test_elsewhere_there_is_a_kit_and_the_reason_is_said(bundle, device, gpu, version, why):
    device(gpu, version)
    request = CompileRequest(find_target("jetson-orin-agx-64gb"), LIMITS, golden=False)
    result = compile_bundle(bundle, request)
    assert result.made is Made.KIT
    assert why in result.reason
    assert (result.directory / "build.sh").is_file()
    assert not (result.directory / RECORD).exists()
    opened = Bundle.open(bundle.path)  # the kit's files are in the manifest
    assert "jetson-orin-agx-64gb" not in opened.manifest.verified


def test_a_kit_after_engines_for_another_target(bundle, device, tmp_path):
    device(Gpu("A100", "8.0", 1), "10.15.0")
    a100 = CompileRequest(find_target("a100"), LIMITS)
    engines = compile_bundle(bundle, a100)
    again = Bundle.open(bundle.path)
    kit = compile_bundle(
        again, CompileRequest(find_target("jetson-orin-agx-64gb"), LIMITS, golden=False, out=tmp_path / "kit")
    )
    assert engines.made is Made.ENGINES
    assert kit.made is Made.KIT
    assert json.loads((tmp_path / "kit" / "kit.json").read_text())["target"] == "jetson-orin-agx-64gb"


def test_a_model_that_cannot_fit_is_refused_and_forced(bundle, device, tmp_path):
    device()
    small = tmp_path / "small.toml"
    small.write_text('extends = "jetson-orin-nano-8gb"\ntitle = "small"\nmemory_bytes = 2_000_500_000\n')
    target = find_target(str(small))
    with pytest.raises(UserError, match="an estimate\\), expected at most") as refused:
        compile_bundle(bundle, CompileRequest(target, LIMITS))
    assert "--force" in refused.value.hint
    assert not (bundle.path / "engines").exists()
    assert compile_bundle(bundle, CompileRequest(target, LIMITS, force=True)).made is Made.ENGINES


def test_a_compiler_that_fails_leaves_nothing(bundle, device, monkeypatch):
    device()

    def fail(job, *, component, target):
        raise UserError("it failed", hint="no hint")

    monkeypatch.setattr(compiling, "compile_component", fail)
    before = (bundle.path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="it failed"):
        compile_bundle(bundle, CompileRequest(find_target("jetson-orin-agx-64gb"), LIMITS))
    assert not (bundle.path / "engines").exists()
    assert (bundle.path / "manifest.json").read_bytes() == before

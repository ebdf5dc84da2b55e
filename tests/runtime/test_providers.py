"""Execution providers: names, what is missing, and that the CPU never steps in unseen.

CI's ONNX Runtime has the provider "AzureExecutionProvider", which runs no node of ours: a real stand-in for a
GPU that cannot run a graph. GPUs themselves are not exercised here.
"""

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from command_line import ep_export
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from test_onnxruntime_runner import joined
from tiny import tiny_picture

from ep_export.errors import UsageError, UserError
from ep_export.runtime import OnnxRuntimeOptions, OnnxRuntimeRunner
from ep_export.runtime.backends import OnnxRuntimeBackend, Runtime, choose_backend
from ep_export.runtime.providers import CPU, PROVIDERS, device_of, prepare_providers, short_name

IDLE = "AzureExecutionProvider"
pytestmark = pytest.mark.skipif(
    IDLE not in onnxruntime.get_available_providers(), reason=f"this ONNX Runtime has no {IDLE}"
)


@pytest.fixture
def graph(tmp_path):
    return joined(tmp_path / "joined.onnx", TensorProto.FLOAT)


@pytest.mark.parametrize("name", PROVIDERS)
def test_short_names_are_onnx_runtimes_own_providers(name):
    assert PROVIDERS[name].name in onnxruntime.get_all_providers()
    assert short_name(PROVIDERS[name].name) == name


def test_the_cpu_is_no_fallback_unless_asked_for(graph):
    with pytest.raises(UserError, match="cannot run all of joined") as caught:
        OnnxRuntimeRunner(graph, OnnxRuntimeOptions((IDLE,)))
    assert "add --provider cpu" in caught.value.hint


def test_what_goes_to_the_cpu_is_counted(graph):
    backend = OnnxRuntimeBackend(OnnxRuntimeOptions((IDLE, "cpu")))
    assert backend(graph).nodes == {CPU: 1}
    backend(graph)
    assert backend.sentence == f"nodes of the graphs: 0 on {IDLE}, 2 on cpu"


def test_the_cpu_alone_needs_no_words(graph):
    backend = choose_backend(None, Runtime.ONNXRUNTIME)
    assert backend(graph).nodes == {}
    assert backend.sentence == ""


@pytest.mark.parametrize("name", sorted(set(PROVIDERS) - {"cpu"}))
def test_a_missing_provider_says_what_brings_it_and_what_there_is(graph, monkeypatch, name):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [IDLE, CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(UserError, match=PROVIDERS[name].name) as caught:
        OnnxRuntimeRunner(graph, OnnxRuntimeOptions((name,)))
    assert PROVIDERS[name].needs in caught.value.hint
    assert f"available here: {IDLE}, cpu" in caught.value.hint


def test_two_builds_over_each_other_are_said_to_be(graph, monkeypatch):
    both = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: both)
    with pytest.raises(UserError, match="installed over each other") as refused:
        OnnxRuntimeRunner(graph, OnnxRuntimeOptions(("cuda",)))
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in refused.value.hint


def test_an_unknown_provider_suggests_the_nearest(graph):
    with pytest.raises(UsageError, match="no cudda") as caught:
        OnnxRuntimeRunner(graph, OnnxRuntimeOptions(("cudda",)))
    assert "cuda" in caught.value.hint


@pytest.fixture
def plugin(monkeypatch):
    """A package that brings TensorRT-RTX's provider, and ONNX Runtime's answers to it: stand-ins, no GPU."""
    package = SimpleNamespace(get_library_path=lambda: "/nowhere/libprovider.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", package)

    def answer(register, devices):
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
        monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)

    return answer


EMPTY = "Must provide one or more OrtEpDevice instances."
MIXED = "All OrtEpDevice values in ep_devices must have the same execution provider."
TWICE = "Provider {} has already been registered."  # told when the session is made


class Options:
    """`SessionOptions` as far as devices go; refuses what ONNX Runtime refuses, in its words."""

    def __init__(self):
        self.entries, self.devices = {}, []

    def add_session_config_entry(self, name, value):
        self.entries[name] = value

    def add_provider_for_devices(self, devices, _options):
        names = {device.ep_name for device in devices}
        if not devices:
            raise InvalidArgument(EMPTY)
        if len(names) > 1:
            raise InvalidArgument(MIXED)
        if names & {device.ep_name for device in self.devices}:
            raise Fail(TWICE.format(names.pop()))
        self.devices += devices


def test_the_stand_in_refuses_as_onnx_runtime_does(graph):
    """Two providers with devices are not to be had here, so that refusal is looked up in the library."""
    cpu = [device for device in onnxruntime.get_ep_devices() if device.ep_name == CPU]
    options = onnxruntime.SessionOptions()
    with pytest.raises(InvalidArgument, match=EMPTY):
        options.add_provider_for_devices([], {})
    options.add_provider_for_devices(cpu, {})
    options.add_provider_for_devices(cpu, {})
    with pytest.raises(Fail, match=TWICE.format(CPU)):
        onnxruntime.InferenceSession(str(graph), options)
    assert MIXED.encode() in Path(onnxruntime_pybind11_state.__file__).read_bytes()


def test_a_plugin_provider_is_registered_and_its_first_device_taken(plugin):
    registered = []
    device = SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")
    other = SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")
    cpu = SimpleNamespace(ep_name=CPU)
    plugin(lambda name, path: registered.append((name, path)), [cpu, device, other])
    options = Options()
    assert prepare_providers(("tensorrt-rtx",), options) == []
    assert registered == [("NvTensorRTRTXExecutionProvider", "/nowhere/libprovider.so")]
    assert options.devices == [device]
    assert options.entries["session.disable_cpu_ep_fallback"] == "1"


def test_a_plugin_provider_and_the_cpu_are_registered_one_by_one(plugin):
    """What the hint of a provider that cannot run all of a graph recommends."""
    device = SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")
    cpu = SimpleNamespace(ep_name=CPU)
    plugin(lambda *_: None, [cpu, device])
    both = Options()
    assert prepare_providers(("tensorrt-rtx", "cpu"), both) == []
    assert both.devices == [device, cpu]
    assert "session.disable_cpu_ep_fallback" not in both.entries


def test_a_provider_by_both_of_its_names_is_one():
    assert prepare_providers(("cpu", CPU), Options()) == [CPU]


def test_tensors_lie_where_the_first_provider_computes():
    assert [device_of(names) for names in (("cpu",), ("cuda", "cpu"), (IDLE, "cpu"), (CPU,))] == [
        "cpu",
        "cuda",
        "cpu",
        "cpu",
    ]


def test_a_plugin_provider_without_a_device_is_refused(plugin):
    plugin(lambda *_: None, [])
    with pytest.raises(UserError, match="it drives no device of this machine"):
        prepare_providers(("tensorrt-rtx",), Options())


def test_a_plugin_that_does_not_load_gives_its_reason(plugin):
    def fail(*_):
        raise RuntimeError("libcuda.so.1: cannot open shared object file\nand more")

    plugin(fail, [])
    with pytest.raises(UserError, match=r"libcuda\.so\.1: cannot open shared object file$"):
        prepare_providers(("tensorrt-rtx",), Options())


def test_a_provider_that_does_not_start_is_not_replaced(graph, monkeypatch):
    real = onnxruntime.InferenceSession

    def without(file, options, **settings):
        assert settings["enable_fallback"] == 0
        return real(file, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without)
    with pytest.raises(UserError, match=f"could not start {IDLE} for joined"):
        OnnxRuntimeRunner(graph, OnnxRuntimeOptions((IDLE, "cpu")))


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"runtime": Runtime.ONNXRUNTIME, "target": "h100"}, "--target chooses engines"),
        ({"runtime": Runtime.TENSORRT, "providers": ("cpu",)}, "--provider, --threads and --exact are"),
        ({"runtime": Runtime.TENSORRT, "threads": 2}, "--threads and --exact are ONNX Runtime's"),
        ({"runtime": Runtime.TENSORRT, "exact": True}, "--threads and --exact are ONNX Runtime's"),
    ],
)
def test_options_of_the_other_runtime_are_refused(choice, sentence):
    runtime = choice.pop("runtime")
    with pytest.raises(UsageError, match=sentence):
        choose_backend(None, runtime, **choice)


def test_run_shows_where_nodes_went(tiny_bundle, tmp_path):
    tiny_picture(140, 112, 1).save(tmp_path / "p.png")
    asked = ["run", str(tiny_bundle.path), "--image", str(tmp_path / "p.png"), "--prompt", "which digits?"]
    asked += ["--max-new-tokens", "2"]
    plain, counted = ep_export(*asked), ep_export(*asked, "--provider", IDLE, "--provider", "cpu")
    assert (plain.code, counted.code) == (0, 0)
    assert plain.out == counted.out
    assert f"nodes of the graphs: 0 on {IDLE}, " in counted.err
    assert "nodes of the graphs" not in plain.err
    refused = ep_export(*asked, "--provider", IDLE)
    assert refused.code == 1
    assert "hint: add --provider cpu" in refused.err


def test_run_without_engines_says_so_and_what_to_do(tiny_bundle):
    result = ep_export("run", str(tiny_bundle.path), "--prompt", "hello", "--runtime", "tensorrt")
    assert result.code == 1
    assert result.err.startswith(f"error: bundle {tiny_bundle.path} has no engines\nhint: compile some:")

"""The built library: its life in the harness, its symbols, TensorRT's registry, the build for a Jetson."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_reference import LIBRARY, output_shapes

SOURCE = Path(__file__).resolve().parents[2] / "plugins" / "entropy_prune"
HARNESS = (SOURCE / "tests" / "harness.cpp").read_text(encoding="utf-8")
CASES = re.findall(r'^    \{"(\w+)", \1\},$', HARNESS, re.MULTILINE)
SKIPPED = 77

REGISTER = """
import json, sys
import tensorrt_lean_bindings as trt
registry = trt.get_plugin_registry()
registry.load_library(sys.argv[1])
creator = registry.get_creator("EntropyPrune", "2", "ep_export")
def create(**fields):
    text = trt.PluginFieldType.CHAR
    fields = trt.PluginFieldCollection([trt.PluginField(n, v.encode(), text) for n, v in fields.items()])
    return creator.create_plugin("node", fields, trt.TensorRTPhase.BUILD)
plugin = create(scorer="released", select="lowest", budget="per_picture")
core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
print(json.dumps({
    "fields": [field.name for field in creator.field_names],
    "plugin": [core.plugin_name, core.plugin_version, core.plugin_namespace],
    "refused": create(scorer="nothing") is None,
}))
"""


def test_the_harness_lists_its_cases():
    assert len(CASES) == len(set(CASES)) > 15


@pytest.mark.parametrize("case", CASES)
def test_plugin_life(built: Path, case: str):
    run = subprocess.run(
        [built / "harness", built / LIBRARY, case],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == SKIPPED:
        pytest.skip(run.stdout.splitlines()[0])
    assert run.returncode == 0, run.stdout + run.stderr


def test_output_shapes_are_the_librarys_own(built: Path):
    first = output_shapes(built, (1, 700, 28, 128), (1, 700, 3584), (3, 1, 700), (576,), (144,))
    assert first == ((1, 268, 3584), (3, 1, 268), (268,), (144,), (576,))
    hidden, position_ids, _, visual_index, _ = first
    second = output_shapes(built, (1, 268, 4, 128), hidden, position_ids, visual_index, (36,))
    assert second == ((1, 160, 3584), (3, 1, 160), (160,), (36,), (144,))


def test_output_shapes_of_what_the_library_refuses_are_its_sentence(built: Path):
    with pytest.raises(ValueError, match="states: expected 4 dimensions, got 3"):
        output_shapes(built, (700, 28, 128), (1, 700, 3584), (3, 1, 700), (576,), (144,))


@pytest.mark.parametrize("build", ["built", "cross_built"])
def test_exported_symbols_are_exactly_two(build: str, request: pytest.FixtureRequest):
    if shutil.which("nm") is None:
        pytest.skip("no nm to list symbols with")
    library = request.getfixturevalue(build) / LIBRARY
    symbols = subprocess.run(
        ["nm", "-D", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    exported = {line.split()[-1] for line in symbols if line.split()[-2] not in "Uw"}
    missing = [
        line for line in symbols if line.split()[-2] == "U" and re.search("nvinfer|getPluginRegistry", line)
    ]
    assert exported == {"getCreators", "setLoggerFinder"}
    assert not missing


def test_the_lean_runtimes_registry_loads_the_library(built: Path):
    if importlib.util.find_spec("tensorrt_lean_bindings") is None:
        pytest.skip("TensorRT lean is not installed (plugins/requirements-test.txt)")
    run = subprocess.run(
        [sys.executable, "-c", REGISTER, str(built / LIBRARY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "fields": ["scorer", "select", "budget"],
        "plugin": ["EntropyPrune", "2", "ep_export"],
        "refused": True,
    }
    assert "scorer: unknown value 'nothing'" in run.stdout + run.stderr


def test_the_jetson_build_lives_under_qemu(cross_built: Path):
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    root = Path("/usr/aarch64-linux-gnu")
    if qemu is None or not root.is_dir():
        pytest.skip("needs qemu-user and g++-aarch64-linux-gnu")
    run = subprocess.run(
        [qemu, "-L", root, cross_built / "harness", cross_built / LIBRARY],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(CASES) - 1} passed, 0 failed, 1 skipped" in run.stdout  # two cuts want a GPU

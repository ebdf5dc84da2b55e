"""`build_plugin` says what is missing before a compiler does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ep_export.errors import UsageError, UserError
from ep_export.plugin import build_plugin, plugin_presets


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing but what the test puts there."""
    for variable in ("CUDA_HOME", "TENSORRT_ROOT", "CUDART_STATIC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def add_tool(folder: Path, name: str) -> None:
    tool = folder / name
    tool.write_text("#!/bin/sh\necho made up; exit 3\n", encoding="utf-8")
    tool.chmod(0o755)


def test_presets_are_those_of_cmake():
    assert plugin_presets() == ("ci", "x86-64", "jetson", "jetpack6")


def test_an_unknown_preset_gets_near_matches(tmp_path: Path):
    with pytest.raises(UsageError, match="no build preset 'jetsen'") as caught:
        build_plugin("jetsen", tmp_path)
    assert "jetson" in caught.value.hint


def test_missing_cmake_is_named(bare_machine: Path):
    with pytest.raises(UserError, match="needs cmake") as caught:
        build_plugin("ci", bare_machine / "out")
    assert "install CMake" in caught.value.hint


def test_a_missing_cross_compiler_is_named(bare_machine: Path):
    add_tool(bare_machine, "cmake")
    add_tool(bare_machine, "nvcc")
    with pytest.raises(UserError, match="aarch64-linux-gnu-g"):
        build_plugin("jetson", bare_machine / "out")


def test_a_missing_cross_runtime_is_named(bare_machine: Path, monkeypatch: pytest.MonkeyPatch):
    for tool in ("cmake", "nvcc", "aarch64-linux-gnu-g++"):
        add_tool(bare_machine, tool)
    monkeypatch.setenv("CUDART_STATIC", str(bare_machine / "libcudart_static.a"))
    with pytest.raises(UserError, match=r"libcudart_static\.a for aarch64") as caught:
        build_plugin("jetson", bare_machine / "out")
    assert "nvidia-cuda-runtime" in caught.value.hint


def test_a_failing_tool_is_quoted(bare_machine: Path):
    add_tool(bare_machine, "cmake")
    add_tool(bare_machine, "nvcc")
    with pytest.raises(UserError, match="configuring the plugin failed") as caught:
        build_plugin("ci", bare_machine / "out")
    assert "made up" in caught.value.hint
    assert (bare_machine / "out" / "failed.log").read_text(encoding="utf-8") == "made up\n"


def test_what_the_build_files_refuse_is_a_sentence_and_a_hint_in_one_line_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """CMake wraps what it is told to say, between its own lines."""
    for tool in ("cmake", "nvcc", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    nowhere = tmp_path / "nowhere"
    monkeypatch.setenv("TENSORRT_ROOT", str(nowhere))
    with pytest.raises(UserError) as caught:
        build_plugin("ci", tmp_path / "out")
    sentence = (
        f"NvInferRuntime.h of TensorRT 10.3 or later was not found (TENSORRT_ROOT is '{tmp_path}/nowhere')"
    )
    assert str(caught.value) == sentence
    assert "\n" not in caught.value.hint
    requirements = re.search(r"--require-hashes -r (\S+)`$", caught.value.hint)
    assert Path(requirements[1]).is_file()  # also where there is no repository

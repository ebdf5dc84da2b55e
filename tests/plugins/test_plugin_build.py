"""`build_plugin` says what is missing before a compiler does."""

from __future__ import annotations

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


def test_a_named_tensorrt_without_headers_stops_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(UserError) as caught:
        build_plugin("ci", tmp_path / "out")
    assert "NvInferRuntime.h" in caught.value.hint or "needs" in str(caught.value)

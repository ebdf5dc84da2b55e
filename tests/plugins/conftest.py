"""The plugin as built by `make plugin`, and its host code compiled here and now."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from plugin_reference import HostLibrary

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugins" / "entropy_prune"


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    """The per-token score and the selection, by a plain C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the host code with")
    library = tmp_path_factory.mktemp("host") / "libhost.so"
    fused = ["-mfma"] if platform.machine() == "x86_64" else []
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        *fused,
        "-shared",
        "-fPIC",
    ]
    subprocess.run(
        [compiler, *flags, str(PLUGIN / "tests" / "host_score.cpp"), "-o", str(library)], check=True
    )
    return HostLibrary(library)


@pytest.fixture(scope="session")
def built() -> Path:
    """Build folder of the plugin for this machine."""
    return _build("EP_PLUGIN_BUILD", "ci", "make plugin")


@pytest.fixture(scope="session")
def cross_built() -> Path:
    """Build folder of the plugin for a Jetson."""
    return _build("EP_PLUGIN_CROSS_BUILD", "jetson", "make plugin")


def _build(variable: str, preset: str, command: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / "build" / "plugin" / preset))
    if not (folder / "libep_entropy_prune.so").is_file():
        pytest.skip(f"no plugin in {folder}; `{command}` builds it")
    return folder

"""The plugin as built by `make plugin`, and its host code compiled here and now."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from plugin_reference import ROOT, HostLibrary, plugin_build

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
        "-O3",  # as CMake's Release: an optimiser that assumes too much shows at no lower level
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
    return _build("ci")


@pytest.fixture(scope="session")
def cross_built() -> Path:
    """Build folder of the plugin for a Jetson."""
    return _build("jetson")


def _build(preset: str) -> Path:
    folder = plugin_build(preset)
    if folder is None:
        pytest.skip(f"the plugin's preset {preset} is not built; `make plugin` builds it")
    return folder

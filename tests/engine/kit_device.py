"""A device to run a kit's scripts on: stand-ins for its programs, which record how they were called.

Nothing here is TensorRT, CUDA or a GPU. The stand-ins show that the scripts call the right programs with the
right arguments and act on what those say; what real ones would do with them is not shown.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from ep_export.bundle import Bundle
from ep_export.engine.kit import write_kit
from ep_export.engine.placement import Placement, place_components
from ep_export.engine.profiles import LimitsRequest, make_profiles, resolve_limits
from ep_export.engine_record import Limits
from ep_export.targets import find_target

__all__ = ["JETPACK6", "JETPACK7", "Device", "limits_for", "make_kit", "place"]

JETPACK6 = "jetson-orin-agx-64gb"  # TensorRT 10.3: the body is stripped
JETPACK7 = "jetson-orin-agx-64gb-jetpack7"  # TensorRT 11.4

_TRTEXEC = Path(__file__).with_name("standin_trtexec.py")
_CMAKE = """#!/usr/bin/env bash
# A stand-in for CMake: it records its arguments and writes a file where the plugin would be. As the real one
# it configures only a folder that holds a CMakeLists.txt, and builds only what it has configured.
printf '%s\\n' "cmake $*" >>"$STANDIN_CALLS.cmake"
if [[ -n ${STANDIN_CMAKE_FAIL:-} ]]; then echo "error: no such header"; exit 1; fi
if [[ $1 == --build ]]; then
  if [[ ! -f $2/CMakeCache.txt ]]; then echo "Error: could not load cache"; exit 1; fi
  echo "a stand-in for the plugin" >"$2/libep_entropy_prune.so"
  exit 0
fi
while (($#)); do
  case $1 in
    -S) source=$2; shift ;;
    -B) build=$2; shift ;;
    -D?*=* | -G) ;;
    *) echo "CMake Error: Unknown argument $1"; exit 1 ;;
  esac
  shift
done
if [[ ! -f $source/CMakeLists.txt ]]; then echo "CMake Error: no CMakeLists.txt in $source"; exit 1; fi
mkdir -p "$build" && touch "$build/CMakeCache.txt"
"""
_NVIDIA_SMI = """#!/usr/bin/env bash
# A stand-in for nvidia-smi; without STANDIN_SM it fails, as it does on machines without a GPU.
case "$*" in
  *compute_cap*) [[ -n ${STANDIN_SM:-} ]] && echo "$STANDIN_SM" ;;
  *memory.free*) echo "${STANDIN_GPU_FREE:-[N/A]}" ;;
esac
"""


@dataclass
class Device:
    """A machine with stand-ins on its PATH.

    Attributes:
        folder: Where they and their records lie.
        tensorrt: Version in trtexec's own digits.
        sm: What nvidia-smi says; empty for nothing.
        compatible: What the kernel calls the board; empty for no Jetson.
        memory_kib: Memory that is free.
        machine: What `uname -m` says.
        environment: Further variables.
    """

    folder: Path
    tensorrt: str = "100300"
    sm: str = ""
    compatible: str = "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0"
    memory_kib: int = 32 << 20
    machine: str = "aarch64"
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = {
            "trtexec": f"#!{sys.executable} -SE\n{_TRTEXEC.read_text()}",
            "cmake": _CMAKE,
            "nvidia-smi": _NVIDIA_SMI,
            "nvcc": "#!/bin/sh\necho nvcc stand-in\n",
            "c++": "#!/bin/sh\n",
            "uname": f"#!/bin/sh\necho {self.machine}\n",
        }
        (self.folder / "bin").mkdir(parents=True)
        (self.folder / "graphs.json").write_text("{}")
        for name, text in programs.items():
            self.install(name, text)
        tree = self.folder / "proc" / "device-tree"
        tree.mkdir(parents=True)
        if self.compatible:
            (tree / "compatible").write_text(self.compatible)
        (self.folder / "proc" / "meminfo").write_text(
            f"MemTotal: 64 kB\nMemAvailable:   {self.memory_kib} kB\n"
        )

    def install(self, name: str, text: str) -> None:
        """Put a program on its PATH."""
        file = self.folder / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment of its programs."""
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
        return {
            "PATH": path,
            "HOME": str(self.folder),
            "PROC": str(self.folder / "proc"),
            "STANDIN_CALLS": str(self.folder / "calls"),
            "STANDIN_GRAPHS": str(self.folder / "graphs.json"),
            "STANDIN_TENSORRT": self.tensorrt,
            "STANDIN_SM": self.sm,
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }

    def run(
        self, kit: Path, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of a kit to its end, from another directory."""
        self.know(kit)
        return subprocess.run(
            [str(kit / script), *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            env={**self.variables, **environment},
        )

    def know(self, kit: Path) -> None:
        """Tell trtexec what the graphs of a kit take: parsing them is what it cannot do by itself."""
        graphs = {file.name: _interface(file.read_bytes()) for file in kit.glob("*.onnx")}
        (self.folder / "graphs.json").write_text(json.dumps(graphs))

    def calls(self) -> list[list[str]]:
        """Arguments of every call of trtexec that was to build something, in order; forgets them."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.split("\x1f") for line in lines]

    def cmake_calls(self) -> list[str]:
        """Every call of CMake; forgets them."""
        file = self.folder / "calls.cmake"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


@cache
def _interface(content: bytes) -> dict[str, object] | None:
    """Inputs with None for axes that vary, what TensorRT would refuse; None for what is no graph."""
    try:
        model = ir.from_proto(onnx.ModelProto.FromString(content))
    except DecodeError:
        return None
    nodes = {node.op_identifier() for node in model.graph if node.domain not in {"", "ai.onnx"}}
    inputs = {
        value.name: [axis if isinstance(axis, int) else None for axis in value.shape]
        for value in model.graph.inputs
    }
    caches = [node.inputs[0].shape for node in model.graph if node.op_type == "TensorScatter"]
    return {
        "inputs": inputs,
        "needs_plugin": bool(nodes - set(model.functions)),  # a node without a body
        "open_caches": not all(isinstance(shape[2], int) for shape in caches),
    }


def limits_for(bundle: Bundle, **request: int) -> Limits:
    """Small limits that hold the first test card."""
    return resolve_limits(bundle, LimitsRequest(max_new_tokens=32, max_pixels=64 * 784, **request))


def make_kit(
    bundle: Bundle,
    out: Path,
    *,
    target: str = JETPACK6,
    golden: bool = False,
    limits: Limits | None = None,
    **placed: Any,
) -> Path:
    """A kit in `out`, made in another place and moved there; `placed` is for `place_components`."""
    limits = limits or limits_for(bundle)
    aside = out.with_name(out.name + ".aside")
    aside.mkdir(parents=True)
    write_kit(
        bundle,
        find_target(target),
        limits,
        make_profiles(bundle, limits),
        aside,
        placement=place(bundle, target, limits, **placed),
        golden=golden,
    )
    shutil.move(aside, out)
    return out


def place(bundle: Bundle, target: str, limits: Limits, **placed: Any) -> Placement:
    """Where components run, with the plugin that a kit builds."""
    return place_components(
        bundle.manifest,
        find_target(target),
        plugin=True,
        max_kept_tokens=limits.max_kept_tokens,
        **placed,
    )

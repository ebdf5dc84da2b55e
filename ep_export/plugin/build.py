"""Build the TensorRT plugin with CMake and nvcc.

A preset name enters, the path of a shared library leaves. The compiler may be an installed CUDA toolkit or
NVIDIA's Python packages; TensorRT's headers come from TENSORRT_ROOT, the system, or the package kernel-lens.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from ep_export.data import data_dir
from ep_export.errors import UsageError, UserError, near_matches

__all__ = ["LIBRARY", "build_plugin", "plugin_presets"]

LIBRARY = "libep_entropy_prune.so"
_CROSS_COMPILER = "aarch64-linux-gnu-g++"
_CROSS_PRESETS = ("jetson",)
# What a failing tool said last is what matters, and a hint is one line.
_LOG_LINES = 3


def plugin_presets() -> tuple[str, ...]:
    """Names that `build_plugin` takes, in the order of CMakePresets.json."""
    presets = json.loads((data_dir("plugins") / "CMakePresets.json").read_text(encoding="utf-8"))
    return tuple(preset["name"] for preset in presets["configurePresets"] if not preset.get("hidden", False))


def build_plugin(preset: str, out: Path) -> Path:
    """Configure and compile the plugin.

    Args:
        preset: A name of `plugin_presets()`: `ci`, `x86-64`, `jetson` or `jetpack6`.
        out: Build folder; created, and reused by the next build.

    Returns:
        The shared library, inside `out`.

    Raises:
        UsageError: The preset does not exist.
        UserError: A tool or header is missing, or a compiler failed.
    """
    if preset not in plugin_presets():
        raise UsageError(
            f"the plugin has no build preset '{preset}'", hint=near_matches(preset, plugin_presets())
        )
    cmake = _tool("cmake", hint="install CMake 3.22 or later, for example with `pip install cmake`")
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    configure = [cmake, "-S", str(data_dir("plugins")), "--preset", preset, "-B", str(out), "-G", generator]
    configure.append(f"-DNVCC={_nvcc()}")
    if (headers := _tensorrt_headers()) is not None:
        configure.append(f"-DTENSORRT_INCLUDE_DIR={headers}")
    if preset in _CROSS_PRESETS:
        _tool(_CROSS_COMPILER, hint="install the cross compiler: apt-get install g++-aarch64-linux-gnu")
        configure.append(f"-DCUDART_STATIC={_cross_runtime()}")
    _run(configure, out, doing="configuring the plugin")
    _run([cmake, "--build", str(out), "-j", str(os.cpu_count() or 1)], out, doing="compiling the plugin")
    return out / LIBRARY


def _tool(name: str, *, hint: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"building the plugin needs {name}, which is not on PATH", hint=hint)
    return found


def _site_folder(package: str, *parts: str) -> Path | None:
    """A folder or file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(location, *parts)
        if path.exists():
            return path
    return None


def _nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    candidates = [
        Path(home, "bin", "nvcc") if home else None,
        Path(found) if (found := shutil.which("nvcc")) else None,
        Path("/usr/local/cuda/bin/nvcc"),
        _site_folder("nvidia", "cu13", "bin", "nvcc"),
    ]
    for candidate in candidates:
        if candidate is not None and candidate.is_file():
            return candidate
    raise UserError(
        "building the plugin needs nvcc, and neither CUDA_HOME nor PATH nor a Python package has it",
        hint="install a CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm "
        "nvidia-cuda-cccl nvidia-cuda-runtime` (13.x)",
    )


def _tensorrt_headers() -> Path | None:
    """Headers of kernel-lens, unless an installation was named: then CMake looks there alone."""
    if os.environ.get("TENSORRT_ROOT"):
        return None
    return _site_folder("kernel_lens", "include", "tensorrt")


def _cross_runtime() -> Path:
    """libcudart_static.a for aarch64: CUDA's own cross packages, or the file that CUDART_STATIC names."""
    named = os.environ.get("CUDART_STATIC")
    path = Path(named or "/usr/local/cuda/targets/aarch64-linux/lib/libcudart_static.a")
    if path.is_file():
        return path.resolve()
    raise UserError(
        f"cross-compiling the plugin needs libcudart_static.a for aarch64, and {path} does not exist",
        hint="`pip install --target DIR --platform manylinux2014_aarch64 --only-binary=:all: --no-deps "
        "nvidia-cuda-runtime` and set CUDART_STATIC=DIR/nvidia/cu13/lib/libcudart_static.a",
    )


def _run(command: list[str], out: Path, *, doing: str) -> None:
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode == 0:
        return
    if told := _refusal(result.stdout):
        raise UserError(told[0], hint=told[1])
    out.mkdir(parents=True, exist_ok=True)
    log = out / "failed.log"
    log.write_text(result.stdout, encoding="utf-8")
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    raise UserError(
        f"{doing} failed: {Path(command[0]).name} exited with {result.returncode}",
        hint=f"{log} has all it said; at last: {' | '.join(lines[-_LOG_LINES:])}",
    )


def _refusal(output: str) -> tuple[str, str] | None:
    """What our CMakeLists.txt refuses, as a sentence and a hint: CMake wraps and indents both."""
    error = re.search(r"^CMake Error at [^\n]* \(message\):\n((?:  [^\n]*\n|\n)+)", output, re.MULTILINE)
    if error is None:
        return None
    sentence, _, hint = " ".join(error[1].split()).partition("hint: ")
    return sentence.strip().rstrip("."), hint.rstrip(".")

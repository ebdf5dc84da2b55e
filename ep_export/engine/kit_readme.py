"""The README of a kit: what a person on the device has to know, for that device and that bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ep_export.bundle import Bundle, Precision
from ep_export.targets import Platform, Target

if TYPE_CHECKING:
    from ep_export.engine.kit_files import Needs
    from ep_export.engine_record import Limits

__all__ = ["POLYGRAPHY_VERSION", "readme"]

POLYGRAPHY_VERSION = "0.53.6"
"""What verify.sh was run with here."""

_TEGRA = ("8.7", "11.0")  # Orin and Thor
_MIB = 1 << 20
_JETSON = """\
- A $title (`cat /etc/nv_tegra_release` tells its JetPack).
- `sudo apt install nvidia-jetpack cmake g++` brings CUDA $cuda, TensorRT $versions with `trtexec` (in
  `/usr/src/tensorrt/bin`) and TensorRT's Python bindings (`python3-libnvinfer`).
- For `verify.sh`: $pip
- `sudo nvpmodel -m 0 && sudo jetson_clocks`, so that TensorRT times its kernels at full clocks."""
_SERVER = """\
- A $title, with a driver for CUDA $cuda (`nvidia-smi`).
- The CUDA $cuda toolkit with `nvcc`, `cmake` 3.22 or later, and `g++`: they build the plugin.
- TensorRT $versions with `trtexec`, headers and Python bindings: NVIDIA's packages (`apt install tensorrt`),
  or an archive whose folder `TENSORRT_ROOT` names. The containers `nvcr.io/nvidia/tensorrt` have all of this.
- For `verify.sh`: $pip"""
_PIP = f"`python3 -m pip install polygraphy=={POLYGRAPHY_VERSION} numpy`"
_PIP_BFLOAT16 = (
    f"`python3 -m pip install polygraphy=={POLYGRAPHY_VERSION} numpy torch`. PyTorch only\n"
    "  because NumPy has no bfloat16; its CPU build will do"
)
_STRIPPED = """\
TensorRT before 10.7 prefers a node's ONNX body to a plugin, so $files hold
the node without that body. They need the plugin; the files without `.plugin` are what ONNX Runtime runs."""
_WITH_BODY = """\
The node of $files keeps its ONNX body: TensorRT takes the plugin where it
is loaded, and with `./build.sh --no-plugin` the body, which is slower and keeps fewer than 3840 tokens."""
_NO_NODE = "No policy in this kit has a plugin: which tokens stay is computed by TensorRT's own layers."
_ON_CPU = """\
$files become no engines: ONNX Runtime runs them on the CPU between the engines
(`python3 -m pip install onnxruntime`)."""


def readme(
    template: Path,
    bundle: Bundle,
    target: Target,
    limits: Limits,
    needs: Needs,
    *,
    with_plugin: Sequence[str],
    on_cpu: Sequence[str],
) -> str:
    """Fill in the template.

    Args:
        template: Text with `$name` where a value goes.
        bundle: The bundle.
        target: What the kit is for.
        limits: What its engines are compiled for.
        needs: What building takes.
        with_plugin: Components whose node the plugin takes the place of.
        on_cpu: Components that ONNX Runtime runs.
    """
    manifest = bundle.manifest
    jetson = target.platform is Platform.AARCH64 and target.sm in _TEGRA
    versions = str(target.versions)
    pip = _PIP_BFLOAT16 if manifest.precision is Precision.BF16 else _PIP
    prerequisites = Template(_JETSON if jetson else _SERVER).substitute(
        title=target.title, cuda=target.cuda, versions=versions, pip=pip
    )
    return Template(template.read_text(encoding="utf-8")).substitute(
        model=_plain(manifest.model_name),
        title=target.title,
        target=target.name,
        sm=target.sm,
        versions=versions,
        prerequisites=prerequisites,
        precision=manifest.precision.value,
        dialect=manifest.dialect.value,
        keep=str(manifest.keep),
        pruning=_pruning(target, with_plugin, on_cpu),
        memory=f"{needs.memory_bytes / _MIB:,.0f}",
        disk=f"{needs.disk_bytes / _MIB:,.0f}",
        max_prompt=limits.max_prompt,
        max_new_tokens=limits.max_new_tokens,
        max_pixels=limits.max_pixels,
        max_kept_tokens=limits.max_kept_tokens,
        max_batch=limits.max_batch,
    )


def _pruning(target: Target, with_plugin: Sequence[str], on_cpu: Sequence[str]) -> str:
    """What computes which tokens stay."""
    suffix = ".plugin.onnx" if target.strips_body else ".onnx"
    parts = []
    if with_plugin:
        body = _STRIPPED if target.strips_body else _WITH_BODY
        parts.append(Template(body).substitute(files=_listed(with_plugin, suffix)))
    elif not on_cpu:
        parts.append(_NO_NODE)
    if on_cpu:
        parts.append(Template(_ON_CPU).substitute(files=_listed(on_cpu, ".onnx")))
    return "\n\n".join(parts)


def _listed(names: Sequence[str], suffix: str) -> str:
    return ", ".join(f"`{name}{suffix}`" for name in names)


def _plain(name: str) -> str:
    """A model's name for a Markdown page: it comes from a manifest and is not trusted."""
    shown = Path(name).name if Path(name).is_absolute() else name
    return "".join(c if c.isalnum() or c in "/._- " else "_" for c in shown)

"""The small files of a kit that its scripts read: settings, options of trtexec, checksums.

Values enter, files that bash reads leave. What comes from a bundle is quoted: a model may be named
anything.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ep_export.bundle import Bundle, Component, Precision, hash_file
from ep_export.engine_record import Profile
from ep_export.errors import UserError

__all__ = [
    "SUMS",
    "GoldenCase",
    "Needs",
    "needs_of",
    "trtexec_arguments",
    "write_checksums",
    "write_settings",
]

SUMS = "SHA256SUMS"
_GIB = 1 << 30
_MIB = 1 << 20
_COPIES = 3  # of a component's weights while trtexec builds: the parser's, the builder's, the engine's
_ROOM = 1.1  # engines are a little larger than their weights
_BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}


@dataclass(frozen=True)
class GoldenCase:
    """What a device is asked to reproduce.

    Attributes:
        name: Of its files: "<component>.<profile>".
        component: Name in the manifest.
        profile: Index of the engine's profile it runs under.
        runs: Sets of inputs.
    """

    name: str
    component: str
    profile: int
    runs: int


@dataclass(frozen=True)
class Needs:
    """What building takes; estimates, not measured.

    Attributes:
        memory_bytes: Three times the largest component's weights and 1 GiB for TensorRT itself.
        disk_bytes: All engines at 1.1 times their weights, and 256 MiB for the plugin and the logs.
    """

    memory_bytes: int
    disk_bytes: int


def needs_of(bundle: Bundle, components: Iterable[Component]) -> Needs:
    """What building the engines of some components takes."""
    each = [_weight_bytes(bundle, component) for component in components]
    return Needs(_COPIES * max(each) + _GIB, math.ceil(_ROOM * sum(each)) + 256 * _MIB)


def _weight_bytes(bundle: Bundle, component: Component) -> int:
    """Bytes of a component's weights: of floating-point ones in the type it computes in."""
    import onnx_ir as ir

    size = _BYTES[bundle.manifest.precision]
    model = ir.load(bundle.file(component.file))
    total = 0
    for value in model.graph.initializers.values():
        weight = value.const_value
        if isinstance(weight, ir.ExternalTensor):
            computes = weight.dtype.is_floating_point() and weight.dtype.itemsize > 1
            total += size * weight.size if computes else weight.nbytes
    return total


def trtexec_arguments(component: Component, profiles: Sequence[Profile]) -> tuple[str, ...]:
    """Options that give trtexec the profiles of a component.

    Several profiles are told apart by `--profile=N` before each one's shapes.

    Raises:
        UserError: An input's name has a character that trtexec's grammar takes for its own.
    """
    dynamic = [spec.name for spec in component.inputs if any(isinstance(axis, str) for axis in spec.shape)]
    for name in dynamic:
        if set(name) & set(",:'*"):
            raise UserError(f"{component.name} has an input named {name!r}, which trtexec cannot be told")
    arguments = []
    for number, profile in enumerate(profiles):
        if len(profiles) > 1:
            arguments.append(f"--profile={number}")
        for option, field in (("min", "minimum"), ("opt", "optimum"), ("max", "maximum")):
            shapes = (f"{name}:{_shape(getattr(profile.inputs[name], field))}" for name in dynamic)
            arguments.append(f"--{option}Shapes={','.join(shapes)}")
    return tuple(arguments)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def write_settings(file: Path, values: Mapping[str, str | int | bool]) -> None:
    """Assignments that bash reads; every value is quoted."""
    lines = (
        f"{name}={shlex.quote(str(int(value) if isinstance(value, bool) else value))}\n"
        for name, value in values.items()
    )
    file.write_text("# Made by ep-export; read by build.sh and verify.sh.\n" + "".join(lines), "utf-8")


def write_checksums(kit: Path, known: Mapping[str, str]) -> None:
    """`SHA256SUMS` of every file, as `sha256sum --check` reads it.

    Args:
        kit: The kit.
        known: Path in the kit -> SHA-256 that was computed before.

    Raises:
        UserError: A file's name would need escaping there.
    """
    lines = []
    for file in sorted(path for path in kit.rglob("*") if path.is_file()):
        name = file.relative_to(kit).as_posix()
        if set(name) & set("\\\n\r"):
            raise UserError(f"bundle file {name!r} cannot be listed in {SUMS}", hint="rename it")
        if name != SUMS:
            lines.append(f"{known.get(name) or hash_file(file)}  {name}\n")
    (kit / SUMS).write_text("".join(lines), encoding="utf-8")

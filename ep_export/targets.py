"""Compile targets: a GPU and its software, as data in `engines/targets/`, one file a target.

Files enter, checked `Target`s leave. A file may name another it `extends` and say only what differs, so that
the same device under other software is one more small file.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ep_export.bundle import Dialect, Precision
from ep_export.data import data_dir
from ep_export.documents import decode
from ep_export.errors import UsageError, UserError, near_matches
from ep_export.numerics import AS_THEY_ARE, WeightKind, Weights
from ep_export.policy import Chooser, Select, TopK, chooser_named

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "CHOOSERS",
    "Flavour",
    "Graphs",
    "Platform",
    "Target",
    "VersionRange",
    "find_target",
    "load_targets",
    "read_target",
    "version_numbers",
]

_FOLDER = "targets"
_EXTENDS = "extends"
_MAX_FILE_BYTES = 1 << 16  # a target is a page of text


class Flavour(str, Enum):
    """What runs the engines."""

    TENSORRT = "tensorrt"  # builds on the GPU it serves; takes the plugin
    TENSORRT_RTX = "tensorrt-rtx"  # builds ahead of time on any x86-64 machine; knows no plugins
    ONNXRUNTIME = "onnxruntime"  # runs the bundle as it is


class Platform(str, Enum):
    """Processor of the machine around the GPU."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"


@dataclass(frozen=True)
class VersionRange:
    """Versions of the runtime a target has, both ends inclusive: "11" as the end includes 11.4.1."""

    minimum: str
    maximum: str

    def holds(self, version: str) -> bool:
        """Whether a version is in the range; digits beyond those of an end are not compared."""
        found, low, high = map(version_numbers, (version, self.minimum, self.maximum))
        return found[: len(low)] >= low and found[: len(high)] <= high

    def __str__(self) -> str:
        return self.minimum if self.minimum == self.maximum else f"{self.minimum} to {self.maximum}.x"


@dataclass(frozen=True)
class Graphs:
    """A pair of dialect and precision that a target takes."""

    dialect: Dialect
    precision: Precision

    def __str__(self) -> str:
        return f"{self.dialect.value} {self.precision.value}"


@dataclass(frozen=True)
class Target:
    """A device and its software.

    Attributes:
        name: File name without its ending; also the folder of its engines in a bundle.
        title: The product, and the software when it matters.
        sm: Compute capability, e.g. "8.7"; None without a GPU.
        flavour: What runs the engines.
        versions: Of TensorRT or TensorRT-RTX; None for ONNX Runtime.
        cuda: CUDA version of that software, e.g. "12.6"; None without a GPU.
        platform: Processor of the machine; None for any.
        memory_bytes: Memory of the GPU; on a Jetson that of the whole module.
        reserved_bytes: What of it is not for engines: the operating system of a Jetson, the driver's context.
        bandwidth_bytes_per_second: Memory bandwidth; None where it depends on the machine (cpu).
        peak_flops: Precision -> dense FLOPs a second with float32 accumulation, a multiply and an add counted
            as two; empty for cpu.
        graphs: What it takes, the best first.
        weights: What the decoder's linear layers may be stored in, the best first: "int4", "int8", "fp8", and
            "none" for as they are; that alone where a file says nothing.
        choosers: Policies its compiler takes in standard operators, by the beginnings of their names: "norm"
            stands for every policy that scores by norm; all where a file says nothing.
        verified: How far the target was verified here: "kit", "compiled" or "run", a colon, a sentence.
        sources: Figure -> where it is published.
    """

    name: str
    title: str
    sm: str | None
    flavour: Flavour
    versions: VersionRange | None
    cuda: str | None
    platform: Platform | None
    memory_bytes: int | None
    reserved_bytes: int
    bandwidth_bytes_per_second: float | None
    peak_flops: Mapping[str, float]
    graphs: tuple[Graphs, ...]
    weights: tuple[str, ...]
    choosers: tuple[str, ...]
    verified: str
    sources: Mapping[str, str]

    @property
    def dtypes(self) -> tuple[Precision, ...]:
        """Precisions it takes, the best first."""
        return tuple(dict.fromkeys(graphs.precision for graphs in self.graphs))

    @property
    def dialects(self) -> tuple[Dialect, ...]:
        """Dialects it takes, the best first."""
        return tuple(dict.fromkeys(graphs.dialect for graphs in self.graphs))

    @property
    def takes_plugins(self) -> bool:
        """Whether its engines may hold the EntropyPrune plugin in place of the node's body."""
        return self.flavour is Flavour.TENSORRT

    @property
    def strips_body(self) -> bool:
        """Whether the body must be cut out for the plugin to be taken: TensorRT before 10.7."""
        if self.flavour is not Flavour.TENSORRT or self.versions is None:
            return False
        return version_numbers(self.versions.minimum) < _PLUGIN_WINS

    def best(self, dialect: Dialect | None = None, precision: Precision | None = None) -> Graphs:
        """The best pair it takes, of that dialect and precision where they are given.

        Raises:
            UsageError: It takes no such pair.
        """
        for graphs in self.graphs:
            if dialect in (None, graphs.dialect) and precision in (None, graphs.precision):
                return graphs
        wanted = " ".join(each.value for each in (dialect, precision) if each)
        raise UsageError(
            f"{self.name} takes no {wanted} graphs", hint=f"it takes {', '.join(map(str, self.graphs))}"
        )

    def takes(self, dialect: Dialect, precision: Precision) -> bool:
        """Whether graphs of this kind compile for it."""
        return Graphs(dialect, precision) in self.graphs

    def takes_weights(self, weights: Weights | None) -> bool:
        """Whether linear layers stored like that can be multiplied there."""
        return (weights.kind.value if weights else AS_THEY_ARE) in self.weights

    def takes_chooser(self, chooser: Chooser) -> bool:
        """Whether its compiler takes a chooser's standard operators; the plugin is another matter."""
        return any(f"{chooser.name}-".startswith(f"{start}-") for start in self.choosers)


_PLUGIN_WINS = (10, 7)
_FLOAT8_SM = (8, 9)
_VERIFIED = ("kit", "compiled", "run", "no")


def load_targets() -> tuple[Target, ...]:
    """Every shipped target, by name.

    Raises:
        UserError: A file is broken.
    """
    files = sorted(_directory().glob("*.toml"), key=lambda file: file.stem)
    return tuple(read_target(file) for file in files)


def find_target(name: str) -> Target:
    """The target of that name, or of a file of one's own (`my-card.toml`).

    Raises:
        UsageError: There is none.
        UserError: The file is broken.
    """
    if name.endswith(".toml"):
        return read_target(Path(name))
    names = [file.stem for file in _directory().glob("*.toml")]
    if name not in names:
        alike = sorted(known for known in names if name.lower() in known) if name else []
        hint = f"targets with that in their name: {', '.join(alike)}" if alike else near_matches(name, names)
        raise UsageError(f"there is no target {name!r}", hint=f"{hint}; `ep-export targets` tells them apart")
    return read_target(_directory() / f"{name}.toml")


def read_target(file: Path) -> Target:
    """Read one file, strictly: a key that is not known is an error, not a wish.

    Raises:
        UserError: Not readable, not TOML, unknown or missing keys, wrong types.
    """
    raw = _read(file)
    unknown = sorted(set(raw) - _KEYS)
    if unknown:
        raise UserError(f"{file} has an unknown key {unknown[0]!r}", hint=near_matches(unknown[0], _KEYS))
    try:
        target = decode(Target, {**_DEFAULTS, **raw, "name": file.stem, "graphs": _graphs(raw)})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a valid target: {error}", hint="see engines/README.md") from error
    _check(target, file)
    return target


def version_numbers(version: str) -> tuple[int, ...]:
    """`"10.3.0.30"` as numbers, up to the first part that is none."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


CHOOSERS = ("paper", "released", "order2", "norm", "divprune", "coverage", "random", "nothing")
"""What `choosers` of a target is where its file says nothing: the beginnings of all policies' names."""

_WEIGHTS = (AS_THEY_ARE, *(kind.value for kind in WeightKind))

_KEYS = frozenset(Target.__dataclass_fields__) - {"name"} | {_EXTENDS}
_DEFAULTS: Mapping[str, Any] = {
    "sm": None,
    "versions": None,
    "cuda": None,
    "platform": None,
    "memory_bytes": None,
    "reserved_bytes": 0,
    "bandwidth_bytes_per_second": None,
    "peak_flops": {},
    "weights": [AS_THEY_ARE],
    "choosers": list(CHOOSERS),
}


def _read(file: Path, *, extending: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file's table over the one it extends."""
    try:
        text = file.read_bytes()[: _MAX_FILE_BYTES + 1].decode("utf-8")
        raw = tomllib.loads(text) if len(text) <= _MAX_FILE_BYTES else {}
    except FileNotFoundError as error:
        raise UserError(f"target file {file} does not exist", hint="see `ep-export targets`") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not readable TOML: {error}", hint="see engines/README.md") from error
    base = raw.pop(_EXTENDS, None)
    if base is None:
        return raw
    known = {known.stem for known in _directory().glob("*.toml")}
    if not isinstance(base, str) or base not in known or base in extending:
        raise UserError(
            f"{file} extends {base!r}, expected the name of another shipped target",
            hint="see `ep-export targets`",
        )
    below = _read(_directory() / f"{base}.toml", extending=(*extending, file.stem))
    return {**below, **raw, "sources": {**below.get("sources", {}), **raw.get("sources", {})}}


def _graphs(raw: Mapping[str, Any]) -> Any:
    """`["portable fp16"]` as records; anything else is left for `decode` to refuse."""
    pairs = raw.get("graphs", ())
    if not isinstance(pairs, list) or not all(isinstance(p, str) and len(p.split()) == 2 for p in pairs):
        raise ValueError(f'graphs is {pairs!r}, expected pairs such as "portable fp16"')
    return [dict(zip(("dialect", "precision"), pair.split(), strict=True)) for pair in pairs]


def _check(target: Target, file: Path) -> None:
    """What the types do not say."""
    gpu = target.flavour is not Flavour.ONNXRUNTIME
    complaint = ""
    if not target.graphs:
        complaint = "it takes no graphs"
    elif gpu and None in (
        target.sm,
        target.versions,
        target.cuda,
        target.memory_bytes,
        target.bandwidth_bytes_per_second,
    ):
        complaint = "a GPU needs sm, versions, cuda, memory_bytes and bandwidth_bytes_per_second"
    elif gpu and (missing := {p.value for p in target.dtypes} - set(target.peak_flops)):
        complaint = f"peak_flops lacks {sorted(missing)[0]}"
    elif target.verified.split(":")[0] not in _VERIFIED:
        complaint = (
            f"verified is {target.verified!r}, expected it to begin with {', '.join(_VERIFIED)} and a colon"
        )
    elif unknown := [start for start in target.choosers if not _begins_policies(start)]:
        complaint = f"choosers has {unknown[0]!r}, which begins no policy's name"
    elif strange := [kind for kind in target.weights if kind not in _WEIGHTS]:
        complaint = f"weights has {strange[0]!r}, expected some of {', '.join(_WEIGHTS)}"
    elif not target.weights:
        complaint = "weights is empty"
    elif WeightKind.FP8.value in target.weights and version_numbers(target.sm or "0") < _FLOAT8_SM:
        complaint = "weights has fp8, which needs SM 8.9 or newer"
    elif unsourced := _figures(target) - set(target.sources):
        complaint = f"no source for {sorted(unsourced)[0]}"
    if complaint:
        raise UserError(f"{file} is not a valid target: {complaint}", hint="see engines/README.md")


def _begins_policies(start: str) -> bool:
    for name in (start, f"{start}-{Select.HIGHEST.value}", f"{start}-{TopK().name}"):
        with contextlib.suppress(UsageError):
            return bool(chooser_named(name))
    return False


def _figures(target: Target) -> set[str]:
    """Figures that need a source."""
    figures = {
        "sm": target.sm,
        "versions": target.versions,
        "cuda": target.cuda,
        "memory_bytes": target.memory_bytes,
        "reserved_bytes": target.reserved_bytes,
        "bandwidth_bytes_per_second": target.bandwidth_bytes_per_second,
        "peak_flops": target.peak_flops,
        "weights": [kind for kind in target.weights if kind != AS_THEY_ARE],
    }
    return {name for name, value in figures.items() if value}


def _directory() -> Path:
    return data_dir("engines") / _FOLDER

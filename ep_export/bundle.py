"""The bundle: a directory whose manifest is the one contract every later stage reads.

Written aside and renamed into place, so that a bundle is either whole or absent. Read with distrust: no
path leaves the bundle, sizes and checksums are checked before a file is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.policy import Evidence, Keep, Policy

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Bundle",
    "Component",
    "Dialect",
    "FileEntry",
    "Manifest",
    "Precision",
    "TensorSpec",
    "WeightsMode",
    "decode",
    "encode",
    "hash_file",
    "list_files",
    "read_manifest",
    "write_manifest",
]

FORMAT = 1
MANIFEST = "manifest.json"
_HASH_BLOCK = 1 << 22

_T = TypeVar("_T")


class Dialect(str, Enum):
    """Which operators the graphs use."""

    PORTABLE = "portable"  # opset 20: MatMul, Softmax, decomposed norms; TensorRT 10.3 up and everywhere else
    MODERN = "modern"  # opset 23: Attention, RMSNormalization, RotaryEmbedding; TensorRT >= 10.15


class Precision(str, Enum):
    """Arithmetic type of the graphs. Scores are always computed in float32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class WeightsMode(str, Enum):
    """How the checkpoint's shards came into the bundle."""

    LINK = "link"  # hard links: no byte copied
    COPY = "copy"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `shape` has an int for a fixed axis and a symbol for a dynamic one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Component:
    """One ONNX file of the bundle and its interface."""

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle; `path` is relative to it, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and what made it.

    Attributes:
        model: Alias, hub id or directory name the checkpoint was asked for by.
        revision: Commit of a hub checkpoint, else None.
        model_sha256: Hash over the checkpoint's config and tensor index (see `Checkpoint.fingerprint`).
        family: Name under `ep_export.families`.
        dims: The decoder's dimensions.
        policy: Where and how tokens are pruned.
        evidence: What the policy stands on.
        keep: Default amount kept; the runtime may override it.
        degree: Degree of the entropy series in the EntropyPrune body.
        dialect: Operators used.
        precision: Arithmetic type.
        opset: ONNX opset of the default domain.
        weights: How shards came in.
        components: The ONNX files.
        files: Every other file of the bundle, manifest excluded.
        tools: Package name -> version that built it.
        verified: Where what was verified: target or runtime -> sentence.
        warnings: What a user of this bundle should know.
        format: Version of this structure.
    """

    model: str
    revision: str | None
    model_sha256: str
    family: str
    dims: DecoderDims
    policy: Policy
    evidence: Evidence
    keep: Keep
    degree: int
    dialect: Dialect
    precision: Precision
    opset: int
    weights: WeightsMode
    components: tuple[Component, ...]
    files: tuple[FileEntry, ...]
    tools: Mapping[str, str]
    verified: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    format: int = FORMAT

    def component(self, name: str) -> Component:
        """The component of that name.

        Raises:
            UserError: The bundle has none.
        """
        for component in self.components:
            if component.name == name:
                return component
        raise UserError(f"bundle has no component {name!r}", hint="build it again with `ep-export build`")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Bundle:
        """Read the manifest and check every file it names.

        Args:
            path: The bundle's directory.
            verify: Also compute every checksum (sizes are always checked).

        Raises:
            UserError: Not a bundle, a newer format, or a missing, changed or escaping file.
        """
        manifest = read_manifest(path)
        for entry in manifest.files:
            _check(path, entry, verify)
        for component in manifest.components:
            _inside(path, component.file)
        return cls(path, manifest)

    def file(self, relative: str) -> Path:
        """Absolute path of a file of the bundle.

        Raises:
            UserError: The path leaves the bundle.
        """
        return _inside(self.path, relative)

    def with_verified(self, where: str, sentence: str) -> Bundle:
        """Record in the manifest on disk what was verified, e.g. after `validate`."""
        verified = {**self.manifest.verified, where: sentence}
        manifest = dataclasses.replace(self.manifest, verified=verified)
        write_manifest(self.path, manifest)
        return Bundle(self.path, manifest)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def list_files(path: Path, known: Mapping[str, str] | None = None) -> tuple[FileEntry, ...]:
    """Every file below `path` but the manifest, with size and checksum.

    Args:
        path: The bundle's directory.
        known: Checksums already computed, by relative path (large shards are hashed while tracing).
    """
    known = known or {}
    entries = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        relative = file.relative_to(path).as_posix()
        if relative != MANIFEST:
            entries.append(FileEntry(relative, file.stat().st_size, known.get(relative) or hash_file(file)))
    return tuple(entries)


def read_manifest(path: Path) -> Manifest:
    """Parse and type-check `manifest.json` without touching the other files.

    Raises:
        UserError: Not a bundle, not JSON, wrong types, or a newer format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{path} is not a bundle: it has no {MANIFEST}", hint="give a directory made by `ep-export build`"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not readable JSON: {error}", hint="build the bundle again") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise UserError(
            f"{file} has format {found}, this ep-export reads up to {FORMAT}", hint="upgrade ep-export"
        )
    try:
        return decode(Manifest, raw)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a valid manifest: {error}", hint="build the bundle again") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, aside first and then renamed."""
    aside = path / (MANIFEST + ".part")
    aside.write_text(json.dumps(encode(manifest), indent=2) + "\n", encoding="utf-8")
    aside.replace(path / MANIFEST)


def encode(value: Any) -> Any:
    """Frozen dataclasses, enums and tuples as plain JSON values."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: type[_T], raw: Any) -> _T:
    """The inverse of `encode`, strict: wrong types and missing fields are errors; extra fields are ignored.

    Raises:
        TypeError, ValueError, KeyError: `raw` does not describe a `kind`.
    """
    return typing.cast("_T", _decode(kind, raw, kind.__name__))


def _decode(kind: Any, raw: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, raw, where)
    if origin is tuple:
        return _decode_tuple(args, raw, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(raw, dict):
            raise TypeError(f"{where}: expected an object, got {type(raw).__name__}")
        return {str(key): _decode(args[1], item, f"{where}.{key}") for key, item in raw.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(raw)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, raw, where)
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        raise TypeError(f"{where}: expected {kind.__name__}, got {type(raw).__name__}")
    return raw


def _decode_union(args: tuple[Any, ...], raw: Any, where: str) -> Any:
    if raw is None and type(None) in args:
        return None
    for option in (a for a in args if a is not type(None)):
        try:
            return _decode(option, raw, where)
        except (TypeError, ValueError):
            continue
    raise TypeError(f"{where}: unexpected {type(raw).__name__}")


def _decode_tuple(args: tuple[Any, ...], raw: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise TypeError(f"{where}: expected a list, got {type(raw).__name__}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if len(args) != len(raw):
        raise TypeError(f"{where}: expected {len(args)} values, got {len(raw)}")
    return tuple(
        _decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(args, raw, strict=True))
    )


def _decode_dataclass(kind: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise TypeError(f"{where}: expected an object, got {type(raw).__name__}")
    hints = typing.get_type_hints(kind)
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in raw:
            values[f.name] = _decode(hints[f.name], raw[f.name], f"{where}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise KeyError(f"{where}.{f.name} is missing")
    return kind(**values)


def _check(path: Path, entry: FileEntry, verify: bool) -> None:
    file = _inside(path, entry.path)
    hint = "build the bundle again, or copy it again whole"
    if not file.is_file():
        raise UserError(f"bundle file {entry.path} is missing", hint=hint)
    size = file.stat().st_size
    if size != entry.bytes:
        raise UserError(
            f"bundle file {entry.path} has {size} bytes, the manifest says {entry.bytes}", hint=hint
        )
    if verify and hash_file(file) != entry.sha256:
        raise UserError(
            f"bundle file {entry.path} was changed: its SHA-256 differs from the manifest's", hint=hint
        )


def _inside(path: Path, relative: str) -> Path:
    """Resolve a manifest path, refusing absolute paths, `..` and links out of the bundle."""
    pure = PurePosixPath(relative)
    file = path.joinpath(*pure.parts)
    root = path.resolve()
    if pure.is_absolute() or ".." in pure.parts or not file.resolve().is_relative_to(root):
        raise UserError(
            f"bundle names a path outside itself: {relative!r}", hint="do not use this bundle; build it again"
        )
    return file

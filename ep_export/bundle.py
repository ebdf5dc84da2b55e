"""The bundle: a directory whose manifest is the one contract every later stage reads.

Written aside and renamed into place, so that a bundle is either whole or absent. Read with distrust: no
path leaves the bundle, sizes and checksums are checked before a file is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath

from ep_export.dims import DecoderDims
from ep_export.documents import read_document, write_document
from ep_export.errors import UserError
from ep_export.policy import Evidence, Keep, Policy

__all__ = [
    "ENGINES",
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
    "hash_file",
    "list_files",
    "read_manifest",
    "write_manifest",
]

FORMAT = 1
MANIFEST = "manifest.json"
ENGINES = "engines"
"""Folder of what `compile` makes."""
_HASH_BLOCK = 1 << 22


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
            UserError: Not a bundle, a newer format, or a missing (but for engines), changed or escaping file.
        """
        manifest = read_manifest(path)
        for entry in manifest.files:
            # Engines may be left behind when a bundle moves: it runs without them.
            if entry.path.startswith(f"{ENGINES}/") and not _inside(path, entry.path).exists():
                continue
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
    return read_document(file, Manifest, what="manifest", newest=FORMAT, hint="build the bundle again")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, aside first and then renamed."""
    write_document(path / MANIFEST, manifest)


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

"""The bundle: a directory whose manifest is the one contract every later stage reads.

Written aside and renamed into place, so that a bundle is either whole or absent. Read with distrust: no
path leaves the bundle, sizes and checksums are checked before a file is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath

from ep_export.dims import DecoderDims
from ep_export.documents import read_document, write_document
from ep_export.errors import UsageError, UserError
from ep_export.numerics import Numerics, RoundingCost
from ep_export.planning import check_schedule
from ep_export.policy import Chooser, Evidence, Keep, Nothing, Schedule

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
    "Role",
    "StoredTable",
    "TensorSpec",
    "WeightsMode",
    "hash_file",
    "list_files",
    "read_manifest",
    "write_manifest",
]

FORMAT = 2
MANIFEST = "manifest.json"
ENGINES = "engines"
"""Folder of what `compile` makes."""
_HASH_BLOCK = 1 << 22


class Dialect(str, Enum):
    """Which operators the graphs use."""

    PORTABLE = "portable"  # opset 20: MatMul, Softmax, decomposed norms; TensorRT 10.3 up and everywhere else
    MODERN = "modern"  # opset 24: Attention, TensorScatter, RMSNormalization, ...; TensorRT >= 10.15
    ONNXRUNTIME = "onnxruntime"  # opset 23 and ONNX Runtime's own: GroupQueryAttention, fused norms

    @property
    def fixed_caches(self) -> bool:
        """Whether spans write into caches of fixed capacity, of several requests in one run."""
        return self is not Dialect.PORTABLE


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


class Role(str, Enum):
    """What a component does."""

    VISION = "vision"  # one picture, or one part of a video -> visual embeddings
    EMBED = "embed"  # token ids -> embeddings
    DECODER = "decoder"  # a span of decoder layers; the last one also norm and lm_head
    PRUNE = "prune"  # chooses and gathers visual tokens between two spans


@dataclass(frozen=True)
class StoredTable:
    """Where in the bundle's shards a matrix lies whose rows are read on the host.

    Attributes:
        file: Path in the bundle.
        offset: Its first byte.
        dtype: "bfloat16", "float32", ...
        shape: Rows, values of a row.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Component:
    """One ONNX file of the bundle and its interface.

    Attributes:
        name: Unique in the bundle.
        file: Path in the bundle.
        role: What it does.
        inputs: In the graph's order.
        outputs: In the graph's order.
        layers: Of a decoder span: its first layer and the one after its last.
        cut: Of a prune component: which cut of the schedule, from 0.
        chooser: Of a prune component: what it computes.
        table: Of the embedding table: where it lies. It is then read on the host and no runtime opens `file`;
            bundles without it are older.
    """

    name: str
    file: str
    role: Role
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[int, int] | None = None
    cut: int | None = None
    chooser: Chooser | None = None
    table: StoredTable | None = None

    @property
    def layer_range(self) -> range:
        """The layers of a decoder span; empty for other components."""
        return range(*self.layers) if self.layers else range(0)


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
        model: Alias or hub id of the checkpoint, or its directory, absolute.
        revision: Commit of a hub checkpoint, else None.
        model_sha256: Hash over the checkpoint's config and tensor index (see `Checkpoint.fingerprint`).
        family: Name under `ep_export.families`.
        dims: The decoder's dimensions.
        schedule: Where and how tokens are pruned unless a run says otherwise.
        evidence: What the schedule stands on.
        keep: Default amount kept; the runtime may override it.
        degree: Degree of the entropy series in prune components.
        dialect: Operators used.
        precision: Arithmetic type.
        opset: ONNX opset of the default domain.
        weights: How shards came in.
        components: The ONNX files.
        files: Every other file of the bundle, manifest excluded.
        tools: Package name -> version that built it.
        verified: Where what was verified: target or runtime -> sentence.
        warnings: What a user of this bundle should know.
        numerics: What the graphs compute in and the decoder's weights are stored in.
        rounding: What storing them so costs beside pruning; empty where nothing is quantised, or where it was
            not measured.
        format: Version of this structure.
    """

    model: str
    revision: str | None
    model_sha256: str
    family: str
    dims: DecoderDims
    schedule: Schedule
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
    numerics: Numerics | None = None
    rounding: tuple[RoundingCost, ...] = ()
    format: int = FORMAT

    @property
    def model_name(self) -> str:
        """What to call the model: its alias or hub id, or the name of its directory."""
        return Path(self.model).name if Path(self.model).is_absolute() else self.model

    def component(self, name: str) -> Component:
        """The component of that name.

        Raises:
            UserError: The bundle has none.
        """
        for component in self.components:
            if component.name == name:
                return component
        raise UserError(f"bundle has no component {name!r}", hint="build it again with `ep-export build`")

    def with_role(self, role: Role) -> tuple[Component, ...]:
        """Components of a role, in the manifest's order."""
        return tuple(component for component in self.components if component.role is role)

    @property
    def embed(self) -> Component:
        """The embedding table."""
        return self.with_role(Role.EMBED)[0]

    @property
    def spans(self) -> tuple[Component, ...]:
        """The decoder's spans, from the first layer to the last."""
        return tuple(sorted(self.with_role(Role.DECODER), key=lambda span: span.layer_range.start))

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the choosers that every cut has, in the manifest's order."""
        prunes = self.with_role(Role.PRUNE)
        names = [{p.chooser.name for p in prunes if p.chooser and p.cut == cut} for cut in self.cuts]
        common = set.intersection(*names)
        return tuple(dict.fromkeys(p.chooser.name for p in prunes if p.chooser and p.chooser.name in common))

    @property
    def cuts(self) -> range:
        """Numbers of the cuts."""
        return range(len(self.schedule.cuts))

    def prune(self, cut: int, policy: str) -> Component:
        """The prune component of a cut that computes a policy.

        Raises:
            UserError: The bundle has none; names those it has.
        """
        here = [p for p in self.with_role(Role.PRUNE) if p.cut == cut and p.chooser is not None]
        for component in here:
            if component.chooser is not None and component.chooser.name == policy:
                return component
        known = ", ".join(p.chooser.name for p in here if p.chooser is not None)
        raise UserError(
            f"bundle has no policy {policy!r} at cut {cut} (layer {self.schedule.cuts[cut].layer}), "
            f"it has {known}",
            hint=f"add it: `ep-export policy add BUNDLE --policy {policy}`",
        )

    def scheduled(self, policies: Sequence[str] = ()) -> Schedule:
        """The schedule with other policies.

        Args:
            policies: None: the bundle's own. One: it at every cut, but for cuts of several that drop every
                token. Else one for every cut.

        Raises:
            UserError: The bundle has no such policy.
            UsageError: Neither one nor one for every cut.
        """
        if not policies:
            return self.schedule
        count = len(self.schedule.cuts)
        if len(policies) not in {1, count}:
            raise UsageError(
                f"{len(policies)} policies for {count} cuts", hint="give --policy once, or once for every cut"
            )
        names = list(policies)
        if len(policies) < count:
            own = [cut.chooser for cut in self.schedule.cuts]
            names = [each.name if isinstance(each, Nothing) else policies[0] for each in own]
        choosers = [self.prune(cut, name).chooser for cut, name in enumerate(names)]
        return self.schedule.with_choosers([chooser for chooser in choosers if chooser is not None])

    def pruned_to(self, keep: Keep | None, policies: Sequence[str] = ()) -> Schedule | None:
        """What prunes a prompt; None where everything is kept although a cut could not but drop every token.

        Args:
            keep: As it was told; None: the bundle's.
            policies: See `scheduled`.
        """
        schedule = self.scheduled(policies)
        drops = any(isinstance(cut.chooser, Nothing) for cut in schedule.cuts)
        return None if drops and keep == Keep(ratio=1.0) else schedule

    def keep_for(self, schedule: Schedule) -> Keep:
        """The bundle's keep, or where a schedule drops everything at its only cut, what that comes to.

        Args:
            schedule: From `scheduled`.
        """
        (first, *others) = schedule.cuts
        if not others and isinstance(first.chooser, Nothing):
            return Keep(ratio=first.layer / self.dims.layers)
        return self.keep

    def stages(self, schedule: Schedule) -> tuple[Component, ...]:
        """What a prefill runs after the embeddings, in order: spans, and a prune component at every cut.

        Args:
            schedule: From `scheduled`.
        """
        prunes = {cut.layer: self.prune(i, cut.chooser.name) for i, cut in enumerate(schedule.cuts)}
        order = [(span.layer_range.start, 1, span) for span in self.spans]
        order += [(layer, 0, prune) for layer, prune in prunes.items()]
        return tuple(component for *_, component in sorted(order, key=lambda entry: entry[:2]))


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

    def with_verified(
        self, where: str, sentence: str, rounding: tuple[RoundingCost, ...] | None = None
    ) -> Bundle:
        """Record in the manifest on disk what was verified, e.g. after `validate`, and what rounding cost."""
        verified = {**self.manifest.verified, where: sentence}
        rounding = self.manifest.rounding if rounding is None else rounding
        manifest = dataclasses.replace(self.manifest, verified=verified, rounding=rounding)
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
    """Every file below `path` but the manifest and other bundles, with size and checksum.

    Args:
        path: The bundle's directory.
        known: Checksums already computed, by relative path (large shards are hashed while tracing).
    """
    known = known or {}
    entries = []
    # A kit inside a bundle is a bundle of its own, with its own list.
    others = {file.parent for file in path.rglob(MANIFEST)} - {path}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        relative = file.relative_to(path).as_posix()
        if relative != MANIFEST and others.isdisjoint(file.parents):
            entries.append(FileEntry(relative, file.stat().st_size, known.get(relative) or hash_file(file)))
    return tuple(entries)


def read_manifest(path: Path) -> Manifest:
    """Parse and type-check `manifest.json` without touching the other files.

    Raises:
        UserError: Not a bundle, not JSON, wrong types, components that do not make a decoder, or another
            format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{path} is not a bundle: it has no {MANIFEST}", hint="give a directory made by `ep-export build`"
        )
    return read_document(
        file,
        Manifest,
        what="manifest",
        newest=FORMAT,
        oldest=FORMAT,
        hint="build the bundle again with `ep-export build`; weights are linked again, not copied",
        check=_check_manifest,
    )


def _check_manifest(manifest: Manifest) -> None:
    """What the types alone do not say.

    Raises:
        ValueError: The components are not one embedding, spans that follow each other from layer 0 to L, and
            for every cut the prune component of its chooser; or two have one name.
    """
    names = [component.name for component in manifest.components]
    if len(set(names)) != len(names):
        raise ValueError("two components have one name")
    if len(manifest.with_role(Role.EMBED)) != 1:
        raise ValueError("expected one component with the role embed")
    spans = tuple(span.layer_range for span in manifest.spans)
    if spans != manifest.schedule.spans(manifest.dims.layers):
        raise ValueError("the decoder's components are not the layers between the cuts")
    for prune in manifest.with_role(Role.PRUNE):
        if prune.chooser is None or prune.cut not in manifest.cuts:
            raise ValueError(f"component {prune.name} names no chooser, or no cut")
    try:
        check_schedule(manifest.schedule, manifest.dims.layers)
        manifest.stages(manifest.schedule)
    except UserError as error:
        raise ValueError(str(error)) from error


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
    try:
        file.exists()  # a name that is too long is said nowhere else
        inside = ".." not in pure.parts and file.resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, too long a name, a null byte
        inside = False
    if pure.is_absolute() or not inside:
        raise UserError(
            f"bundle names a path outside itself: {relative!r}", hint="do not use this bundle; build it again"
        )
    return file

"""What an engine directory says about itself: `engines/<target>/engine.json`, written last.

A compiler writes it, a runner reads it before it loads an engine: engines serve one GPU, one version of
TensorRT and one bundle, and TensorRT's own message about a wrong one helps nobody. Checksums say from what
every engine was compiled, so that compiling again makes only what changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ep_export.bundle import (
    ENGINES,
    MANIFEST,
    Bundle,
    Component,
    Dialect,
    Manifest,
    Precision,
    Role,
    hash_file,
)
from ep_export.documents import read_document, write_document
from ep_export.errors import UserError
from ep_export.policy import Schedule
from ep_export.targets import Flavour, version_numbers

__all__ = [
    "ENGINES",
    "RECORD",
    "EngineFile",
    "EngineRecord",
    "Limits",
    "PluginFile",
    "Profile",
    "ShapeRange",
    "check_engine",
    "check_engine_files",
    "compiled_targets",
    "engine_directory",
    "engine_of",
    "read_record",
    "source_sha256",
    "write_record",
]

RECORD = "engine.json"
FORMAT = 2
_WEIGHTS = "weights/"
_ROWS = 16
# An engine is good for the release that built it; the fourth number of a version is a build of that release.
_RELEASE_NUMBERS = 3


@dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input: the smallest, the one kernels are chosen for, the largest."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a shape lies in the range."""
        if len(shape) != len(self.minimum):
            return False
        bounds = zip(self.minimum, shape, self.maximum, strict=True)
        return all(low <= size <= high for low, size, high in bounds)


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of a component.

    Attributes:
        name: "prefill" and "decode" of a decoder span, "prefill" of a prune component, "all" of the others.
        inputs: Input name -> its shapes; every input of the component is there.
    """

    name: str
    inputs: Mapping[str, ShapeRange]

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether inputs of these shapes run under this profile."""
        return all(self.inputs[name].holds(shape) for name, shape in shapes.items())


@dataclass(frozen=True)
class Limits:
    """What engines are compiled for.

    Attributes:
        max_prompt: Longest prompt in tokens, visual ones included.
        max_new_tokens: Longest answer in tokens.
        max_pixels: Largest picture, width times height; what it means in visual tokens is the family's.
        max_kept_tokens: Most visual tokens that go on at a cut, over all pictures of a prompt.
        max_batch: Most answers that one decode step continues.
        max_behind: Longest prompt behind a cut in tokens; None: as long as before it.
    """

    max_prompt: int
    max_new_tokens: int
    max_pixels: int
    max_kept_tokens: int
    max_batch: int = 1
    max_behind: int | None = None

    def at(self, component: Component, schedule: Schedule) -> Limits:
        """Those of a component: what arrives behind a cut may be shorter."""
        if component.role is Role.DECODER:
            behind = any(cut.layer <= component.layer_range.start for cut in schedule.cuts)
        else:
            behind = bool(component.cut)
        return replace(self, max_prompt=self.max_behind) if behind and self.max_behind else self

    @property
    def capacity(self) -> int:
        """C, rows of caches of fixed capacity.

        A multiple of 16, so that every slot of a batch begins at a multiple of 256 bytes: TensorRT reads no
        other addresses.
        """
        return -(-(self.max_past + 1) // _ROWS) * _ROWS

    @property
    def max_past(self) -> int:
        """Longest cache a decode step meets: the last token of an answer is never fed back."""
        return max(1, self.max_prompt + self.max_new_tokens - 1)


@dataclass(frozen=True)
class EngineFile:
    """One engine.

    Attributes:
        role: What its component does.
        file: Its name, beside the record.
        sha256: Of the file.
        bytes: Its size.
        build_seconds: Wall time of its compilation.
        profiles: In the order of the engine's own profile indices.
        source: What it was compiled from; see `source_sha256`.
        plugin: Whether it holds the EntropyPrune plugin, which must then be loaded before it.
    """

    role: Role
    file: str
    sha256: str
    bytes: int
    build_seconds: float
    profiles: tuple[Profile, ...]
    source: str
    plugin: bool = False


@dataclass(frozen=True)
class PluginFile:
    """The library of the EntropyPrune plugin.

    Attributes:
        file: Its name, beside the record.
        sha256: Of the file.
        bytes: Its size.
    """

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class EngineRecord:
    """Engines of one bundle for one target.

    Attributes:
        target: Name of the target.
        sm: Compute capability, e.g. "8.9".
        flavour: What runs them.
        version: Of TensorRT or TensorRT-RTX that built them.
        cuda: CUDA version of that software.
        model: As in the manifest.
        dialect: Of the graphs.
        precision: Of the graphs.
        limits: What they were compiled for.
        components: Component name -> its engine: every component but prune components of other policies.
        on_cpu: Prune components that stay ONNX files of the bundle and run in ONNX Runtime on the CPU.
        plugin: The library that some of the engines need; None where none does.
        made_by: Package name -> version.
        format: Version of this structure.
    """

    target: str
    sm: str
    flavour: Flavour
    version: str
    cuda: str
    model: str
    dialect: Dialect
    precision: Precision
    limits: Limits
    components: Mapping[str, EngineFile]
    on_cpu: tuple[str, ...]
    plugin: PluginFile | None
    made_by: Mapping[str, str]
    format: int = FORMAT

    @property
    def files(self) -> tuple[EngineFile | PluginFile, ...]:
        """Everything it vouches for."""
        return (*self.components.values(), *((self.plugin,) if self.plugin else ()))


def engine_directory(bundle: Path, target: str) -> Path:
    """Where the engines of a bundle for a target lie."""
    return bundle / ENGINES / target


def compiled_targets(bundle: Path) -> tuple[str, ...]:
    """Targets whose engines lie in a bundle."""
    return tuple(sorted(file.parent.name for file in (bundle / ENGINES).glob(f"*/{RECORD}")))


def source_sha256(manifest: Manifest, component: Component) -> str:
    """Hash over what an engine is compiled from, out of the manifest's checksums: nothing is read.

    That is the component's file and, but for prune components, which have none, all weights.
    """
    weighty = component.role is not Role.PRUNE
    made_of = sorted(
        f"{entry.path} {entry.sha256}\n"
        for entry in manifest.files
        if entry.path == component.file or (weighty and entry.path.startswith(_WEIGHTS))
    )
    return hashlib.sha256("".join(made_of).encode()).hexdigest()


def read_record(directory: Path) -> EngineRecord:
    """Read and type-check a record; the engines are not touched.

    Raises:
        UserError: There is none, or it is not readable, or of another format.
    """
    file = directory / RECORD
    hint = "compile again with `ep-export compile`"
    if not file.is_file():
        raise UserError(f"{directory} has no engines: {RECORD} is missing", hint=hint)
    return read_document(file, EngineRecord, what="engine record", newest=FORMAT, oldest=FORMAT, hint=hint)


def write_record(directory: Path, record: EngineRecord) -> None:
    """Write `engine.json`, aside first and then renamed."""
    write_document(directory / RECORD, record)


def check_engine(
    record: EngineRecord,
    bundle: Bundle,
    *,
    flavour: Flavour,
    version: str,
    sm: str | None,
) -> None:
    """Refuse engines that are not for this bundle, this software or this GPU.

    Args:
        record: What the engines say.
        bundle: The bundle they are to run.
        flavour: Of the runtime that is to load them.
        version: Of that runtime.
        sm: Compute capability of the GPU; None when it is not known, and then not compared.

    Raises:
        UserError: Says what the engines are for and what was expected.
    """
    what = f"engines for {record.target}"
    again = f"ep-export compile {bundle.path} --target"
    if record.flavour is not flavour:
        raise UserError(
            f"{what} are for {record.flavour.value}, expected {flavour.value}",
            hint=f"choose the runtime {record.flavour.value}, or compile for another target: {again} T",
        )
    if _release(record.version) != _release(version):
        raise UserError(
            f"{what} were built by {flavour.value} {record.version}, expected {version}, which is installed",
            hint=f"install that version, or compile again: {again} {record.target}",
        )
    if sm is not None and sm != record.sm:
        raise UserError(
            f"{what} are for SM {record.sm}, expected SM {sm}, which this GPU is",
            hint=f"compile for this GPU (see `ep-export targets`): {again} T",
        )
    manifest = bundle.manifest
    components = [
        c
        for c in manifest.components
        if (c.role is not Role.PRUNE and c.table is None) or c.name in record.components
    ]
    for component in components:
        engine = record.components.get(component.name)
        if engine is None:
            raise UserError(
                f"{what} lack {component.name}, expected one for every component of {bundle.path / MANIFEST}",
                hint=f"compile again: {again} {record.target} --overwrite",
            )
        if engine.source != source_sha256(manifest, component):
            raise UserError(
                f"{what} were built from another bundle ({record.model}): {component.name} or its weights "
                f"differ from those of {bundle.path} ({manifest.model_name})",
                hint=f"compile this bundle: {again} {record.target} --overwrite",
            )


def engine_of(record: EngineRecord, bundle: Bundle, component: Component) -> EngineFile | None:
    """The engine of a component; None where ONNX Runtime runs the bundle's own file on the CPU.

    Raises:
        UserError: It was not compiled: a policy that was added later.
    """
    if component.name in record.on_cpu:
        return None
    if component.name in record.components:
        return record.components[component.name]
    policy = component.chooser.name if component.chooser else ""
    raise UserError(
        f"engines for {record.target} lack {component.name}, which nobody has compiled yet",
        hint=f"only it is then compiled: ep-export compile {bundle.path} --target {record.target}"
        + (f" --policy {policy}" if policy else ""),
    )


def check_engine_files(directory: Path, record: EngineRecord, *, verify: bool = True) -> None:
    """Check that the engines and the plugin a record names are there, whole and inside the directory.

    Args:
        directory: Where the record lies.
        record: What it says.
        verify: Also compute checksums (sizes are always checked).

    Raises:
        UserError: One is missing, changed, or named by a path.
    """
    for entry in record.files:
        _check_file(directory, entry, verify)


def _check_file(directory: Path, entry: EngineFile | PluginFile, verify: bool) -> None:
    hint = "compile again with `ep-export compile`, or copy the engines again whole"
    what = "engine" if isinstance(entry, EngineFile) else "plugin"
    if Path(entry.file).name != entry.file:
        raise UserError(f"{directory / RECORD} names a path outside itself: {entry.file!r}", hint=hint)
    file = directory / entry.file
    if not file.is_file():
        raise UserError(f"{what} {file} is missing", hint=hint)
    if file.stat().st_size != entry.bytes:
        raise UserError(
            f"{what} {file} has {file.stat().st_size} bytes, its record says {entry.bytes}", hint=hint
        )
    if verify and hash_file(file) != entry.sha256:
        raise UserError(f"{what} {file} was changed: its SHA-256 differs from its record's", hint=hint)


def _release(version: str) -> tuple[int, ...]:
    return version_numbers(version)[:_RELEASE_NUMBERS]

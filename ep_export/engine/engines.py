"""Engines of a bundle, written whole: compiled one process a component, or taken over from earlier.

An engine is taken over when what it was compiled from, its profiles, the compiler and the plugin are the
same: a policy added to a bundle costs its own small engine, not the spans'.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import ep_export
from ep_export.bundle import Bundle, Component, hash_file
from ep_export.engine.compiler import compile_component
from ep_export.engine.placement import Placement, takes_plugin
from ep_export.engine.profiles import Profiles
from ep_export.engine.sources import compiler_source
from ep_export.engine.worker import Job
from ep_export.engine_record import (
    RECORD,
    EngineFile,
    EngineRecord,
    Limits,
    PluginFile,
    read_record,
    source_sha256,
    write_record,
)
from ep_export.errors import UserError
from ep_export.links import link_or_copy
from ep_export.plugin.build import LIBRARY
from ep_export.progress import Progress
from ep_export.staging import staged
from ep_export.targets import Target

__all__ = ["Earlier", "EngineJob", "find_earlier", "write_engines"]

_SUFFIX = ".engine"


@dataclass(frozen=True)
class Earlier:
    """Engines that lie where others are to be written."""

    directory: Path
    record: EngineRecord


@dataclass(frozen=True)
class EngineJob:
    """What is to be written.

    Attributes:
        bundle: The bundle.
        target: What engines are for.
        compiler: Version of TensorRT or TensorRT-RTX that compiles.
        limits: What they are compiled for.
        profiles: Component name -> profiles.
        placement: Which components become engines.
        plugin: Library of the plugin; None: bodies are compiled.
        earlier: Engines to take over where they are good.
    """

    bundle: Bundle
    target: Target
    compiler: str
    limits: Limits
    profiles: Profiles
    placement: Placement
    plugin: Path | None
    earlier: Earlier | None

    def with_plugin(self, component: Component) -> bool:
        """Whether the engine of a component holds the plugin."""
        return self.plugin is not None and takes_plugin(component)


def find_earlier(directory: Path) -> Earlier | None:
    """Engines in a directory; None where there are none that this version reads."""
    if not (directory / RECORD).is_file():
        return None
    try:
        return Earlier(directory, read_record(directory))
    except UserError:
        return None


def write_engines(
    job: EngineJob, out: Path, progress: Progress, *, overwrite: bool
) -> tuple[EngineRecord, tuple[str, ...]]:
    """Write every engine and the record.

    Args:
        job: What to write.
        out: The directory.
        progress: Told about every component that is compiled.
        overwrite: Replace earlier engines that are no good any more; without, only add to them.

    Returns:
        The record, and the components whose engines were taken over.

    Raises:
        UserError: The compiler failed; or earlier engines would have to be replaced.
    """
    plugin = _plugin_file(job)
    reused = {
        component.name: engine
        for component in job.placement.engines
        if (engine := _reusable(job, component, plugin)) is not None
    }
    if job.earlier is not None and not overwrite:
        stale = sorted(set(job.earlier.record.components) - set(reused))
        if stale:
            raise UserError(
                f"{out} exists already, with an engine of {stale[0]} that would be another now",
                hint="--overwrite replaces what changed; or give another --out",
            )
    with staged(out, overwrite=overwrite or job.earlier is not None, marker=RECORD) as aside:
        record = EngineRecord(
            target=job.target.name,
            sm=job.target.sm or "",
            flavour=job.target.flavour,
            version=job.compiler,
            cuda=job.target.cuda or "",
            model=job.bundle.manifest.model_name,
            dialect=job.bundle.manifest.dialect,
            precision=job.bundle.manifest.precision,
            limits=job.limits,
            components=_compile(job, reused, aside, progress),
            on_cpu=tuple(component.name for component in job.placement.on_cpu),
            plugin=plugin,
            made_by={
                "ep-export": ep_export.__version__,
                job.target.flavour.value: job.compiler,
                "polygraphy": version("polygraphy"),
            },
        )
        if plugin is not None and job.plugin is not None:
            shutil.copyfile(job.plugin, aside / plugin.file)  # a link would change with the next build of it
        write_record(aside, record)
    return record, tuple(reused)


def _plugin_file(job: EngineJob) -> PluginFile | None:
    """The library beside the engines, where one of them needs it."""
    if job.plugin is None or not any(map(job.with_plugin, job.placement.engines)):
        return None
    return PluginFile(LIBRARY, hash_file(job.plugin), job.plugin.stat().st_size)


def _reusable(job: EngineJob, component: Component, plugin: PluginFile | None) -> EngineFile | None:
    """The earlier engine of a component, if it is the one that compiling would make again."""
    if job.earlier is None:
        return None
    record = job.earlier.record
    engine = record.components.get(component.name)
    if engine is None or (record.flavour, record.version, record.sm, record.cuda) != (
        job.target.flavour,
        job.compiler,
        job.target.sm,
        job.target.cuda,
    ):
        return None
    wanted = source_sha256(job.bundle.manifest, component), job.profiles[component.name]
    if (engine.source, engine.profiles) != wanted or engine.plugin != job.with_plugin(component):
        return None
    if engine.plugin and record.plugin != plugin:
        return None
    file = job.earlier.directory / engine.file
    whole = Path(engine.file).name == engine.file and file.is_file() and hash_file(file) == engine.sha256
    return engine if whole else None


def _compile(
    job: EngineJob, reused: Mapping[str, EngineFile], aside: Path, progress: Progress
) -> dict[str, EngineFile]:
    """One engine a component, into `aside`."""
    engines: dict[str, EngineFile] = {}
    with TemporaryDirectory(dir=aside) as scratch:
        for component in job.placement.engines:
            if job.earlier is not None and component.name in reused:
                engine = reused[component.name]
                link_or_copy(job.earlier.directory / engine.file, aside / engine.file)
            else:
                stage = f"compile {component.name}"
                progress(stage, 0, 1)
                engine = _compile_one(job, component, aside, Path(scratch))
                progress(stage, 1, 1)
            engines[component.name] = engine
    return engines


def _compile_one(job: EngineJob, component: Component, aside: Path, scratch: Path) -> EngineFile:
    plugin = job.with_plugin(component)
    file = aside / f"{component.name}{_SUFFIX}"
    profiles = job.profiles[component.name]
    source = compiler_source(job.bundle, component, job.target, job.limits, scratch, plugin=plugin)
    outcome = compile_component(
        Job(
            onnx=str(source.absolute()),
            engine=str(file.absolute()),
            flavour=job.target.flavour,
            sm=job.target.sm or "",
            profiles=profiles,
            plugin=str(job.plugin.absolute()) if plugin and job.plugin else None,
        ),
        component=component.name,
        target=job.target,
    )
    return EngineFile(
        role=component.role,
        file=file.name,
        sha256=hash_file(file),
        bytes=outcome.bytes,
        build_seconds=round(outcome.seconds, 2),
        profiles=profiles,
        source=source_sha256(job.bundle.manifest, component),
        plugin=plugin,
    )

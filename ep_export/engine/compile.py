"""A bundle compiled for a target: engines, a kit that makes them on the device, or nothing for a CPU.

    checks -> placement -> profiles -> one engine a component -> engine.json -> manifest

The output is written aside and renamed into place, so that it is whole or absent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path

from ep_export.bundle import Bundle, FileEntry, Role, hash_file, write_manifest
from ep_export.engine.checks import (
    check_fit,
    check_graphs,
    check_machine,
    check_stored,
    check_weights,
    estimate_limits,
)
from ep_export.engine.compiler import installed_version, require_compiler
from ep_export.engine.device import find_gpu
from ep_export.engine.engines import Earlier, EngineJob, find_earlier, write_engines
from ep_export.engine.placement import Placement, PruneOn, check_chooser, place_components
from ep_export.engine.profiles import MAX_NEW_TOKENS, LimitsRequest, make_profiles, resolve_limits
from ep_export.engine_record import ENGINES, RECORD, EngineRecord, Limits, engine_directory
from ep_export.errors import UsageError
from ep_export.fit import Estimate, estimate
from ep_export.numerics import Weights
from ep_export.planning import Plan
from ep_export.progress import Progress, silent
from ep_export.staging import refuse_existing, staged
from ep_export.targets import Flavour, Graphs, Platform, Target

__all__ = [
    "CompileRequest",
    "CompileResult",
    "Output",
    "check_ahead",
    "check_compiler",
    "compile_bundle",
]


class Output(str, Enum):
    """What compiling leaves."""

    ENGINES = "engines"
    KIT = "kit"
    NOTHING = "nothing"


@dataclass(frozen=True)
class CompileRequest:
    """What was asked for. Where engines lie already, what is None or empty here is as it was for them.

    Attributes:
        target: The device.
        limits: What engines must be able to do.
        policies: To have ready besides those of the bundle's schedule.
        prune_on: What runs prune components; None: the target.
        out: Where engines or kit go; None: `engines/<target>` in the bundle.
        overwrite: Replace earlier ones; without, engines that are missing are added.
        force: Go on although an estimate says that they do not fit.
        plugin: Library of the TensorRT plugin, for compiling in place; None: the node's body is compiled.
        model: Checkpoint that a kit's golden outputs come from; the one the bundle names when None.
        golden: Put golden outputs into a kit; the model is loaded for them.
    """

    target: Target
    limits: LimitsRequest = field(default_factory=LimitsRequest)
    policies: tuple[str, ...] = ()
    prune_on: PruneOn | None = None
    out: Path | None = None
    overwrite: bool = False
    force: bool = False
    plugin: Path | None = None
    model: str | None = None
    golden: bool = True


@dataclass(frozen=True)
class CompileResult:
    """What compiling left.

    Attributes:
        output: Engines, a kit, or nothing.
        directory: Where; None for nothing.
        reason: Why a kit, or nothing, instead of engines; empty for engines.
        limits: What the engines are for; None for nothing.
        estimate: Memory at these limits; None without published figures.
        record: Of engines.
        reused: Components whose engines were there already and are still good.
    """

    output: Output
    directory: Path | None
    reason: str = ""
    limits: Limits | None = None
    estimate: Estimate | None = None
    record: EngineRecord | None = None
    reused: tuple[str, ...] = ()


def compile_bundle(bundle: Bundle, request: CompileRequest, progress: Progress = silent) -> CompileResult:
    """Compile every component that is used, or write the kit that does.

    Args:
        bundle: An opened bundle. Engines that go into it are listed in its manifest afterwards; a kit is not,
            it has checksums of its own.
        request: See `CompileRequest`.
        progress: Told about every component.

    Raises:
        UserError: The target does not take these graphs or policies, they do not fit, the compiler is missing
            or failed, or earlier engines would be replaced.
        UsageError: The limits are impossible.
    """
    target = request.target
    check_graphs(bundle, target)
    check_weights(bundle, target)
    if target.flavour is Flavour.ONNXRUNTIME:
        return CompileResult(Output.NOTHING, None, "ONNX Runtime runs the bundle as it is")
    if request.plugin and not target.takes_plugins:
        raise UsageError(
            f"{target.name} is a {target.flavour.value} target, which takes no plugins",
            hint="leave out --plugin",
        )
    out = request.out or engine_directory(bundle.path, target.name)
    reason = _why_kit(target)
    earlier = None if reason else find_earlier(out)
    if earlier is not None and not request.overwrite:
        request = _continued(bundle, request, earlier)
    limits = resolve_limits(bundle, _suiting(target, request.limits))
    placement = place_components(
        bundle.manifest,
        target,
        policies=request.policies,
        prune_on=request.prune_on or PruneOn.TARGET,
        plugin=request.plugin is not None or bool(reason),  # a kit builds the plugin
        max_kept_tokens=limits.max_kept_tokens,
    )
    guessed = estimate_limits(bundle, target, limits)
    if not request.force:
        check_fit(target, limits.max_prompt, guessed, pruned=True)
    with _no_folder_left(out.parent):
        if reason:
            _write_kit(bundle, request, placement, limits, out, progress)
            return CompileResult(Output.KIT, out, reason, limits, guessed)
        record, reused = _write_engines(bundle, request, placement, limits, guessed, out, earlier, progress)
    if request.out is None:
        _list_engines(bundle, out, record)
    return CompileResult(Output.ENGINES, out, "", limits, guessed, record, reused)


def check_compiler(request: CompileRequest) -> None:
    """Refuse a target whose compiler is not here, before a bundle is built for it.

    Raises:
        UserError: See `require_compiler`.
    """
    target = request.target
    if target.flavour is not Flavour.ONNXRUNTIME and not _why_kit(target):
        require_compiler(target)


def check_ahead(request: CompileRequest, plan: Plan, graphs: Graphs, weights: Weights | None = None) -> None:
    """Refuse what the target cannot compute or hold, before a bundle is built for it.

    Args:
        request: What compiling will be asked for.
        plan: Of a typical picture; `compile_bundle` checks again at the limits.
        graphs: What the bundle will have.
        weights: What its linear layers will be stored in.

    Raises:
        UserError: The target does not take a policy or the weights, or the model does not fit.
    """
    target = request.target
    check_stored(weights, target, "the bundle")
    if target.flavour is not Flavour.ONNXRUNTIME and request.prune_on is not PruneOn.CPU:
        plugin = request.plugin is not None or bool(_why_kit(target))
        for cut in plan.schedule.cuts:
            check_chooser(cut.chooser, target, plugin=plugin)
    new_tokens = request.limits.max_new_tokens or MAX_NEW_TOKENS
    guessed = estimate(plan, target, new_tokens=new_tokens, graphs=graphs, weights=weights)
    if not request.force:
        check_fit(
            target,
            plan.visual_tokens + plan.text_tokens,
            guessed,
            pruned=request.limits.max_kept_tokens is not None,
        )


def _why_kit(target: Target) -> str:
    """Why engines cannot be built on this machine; empty when they can."""
    if target.flavour is Flavour.TENSORRT_RTX:
        return ""
    gpu, installed = find_gpu(), installed_version(Flavour.TENSORRT)
    if gpu is None or gpu.sm != target.sm:
        here = f"a GPU of SM {gpu.sm}" if gpu else "no GPU"
        return f"TensorRT compiles on the GPU it serves, SM {target.sm}; this machine has {here}"
    if installed is None:
        return "TensorRT is not installed in this environment"
    if target.versions is not None and not target.versions.holds(installed):
        return f"TensorRT here is {installed}, the target has {target.versions}"
    return ""


def _suiting(target: Target, limits: LimitsRequest) -> LimitsRequest:
    """A device at the edge answers one person at a time, unless it is told otherwise."""
    edge = target.platform is Platform.AARCH64
    return replace(limits, max_batch=1) if edge and limits.max_batch is None else limits


def _continued(bundle: Bundle, request: CompileRequest, earlier: Earlier) -> CompileRequest:
    """The request with what it leaves open taken from the engines that are there."""
    record = earlier.record
    names = (*record.components, *record.on_cpu)
    policies = [
        prune.chooser.name
        for prune in bundle.manifest.with_role(Role.PRUNE)
        if prune.name in names and prune.chooser
    ]
    limits = asdict(record.limits)
    if limits.pop("max_behind") is None:  # nobody said how many are kept
        limits["max_kept_tokens"] = None
    told = {name: value for name, value in asdict(request.limits).items() if value is not None}
    return replace(
        request,
        limits=LimitsRequest(**{**limits, **told}),
        policies=tuple(dict.fromkeys((*policies, *request.policies))),
        prune_on=request.prune_on or (PruneOn.CPU if record.on_cpu else PruneOn.TARGET),
        plugin=request.plugin or (earlier.directory / record.plugin.file if record.plugin else None),
    )


def _write_kit(
    bundle: Bundle,
    request: CompileRequest,
    placement: Placement,
    limits: Limits,
    out: Path,
    progress: Progress,
) -> None:
    from ep_export.engine.kit import KIT, write_kit

    with staged(out, overwrite=request.overwrite, marker=KIT) as aside:
        write_kit(
            bundle,
            request.target,
            limits,
            make_profiles(bundle, limits),
            aside,
            progress,
            placement=placement,
            model=request.model,
            golden=request.golden,
        )


def _write_engines(
    bundle: Bundle,
    request: CompileRequest,
    placement: Placement,
    limits: Limits,
    guessed: Estimate | None,
    out: Path,
    earlier: Earlier | None,
    progress: Progress,
) -> tuple[EngineRecord, tuple[str, ...]]:
    compiler = require_compiler(request.target)
    refuse_existing(out, overwrite=request.overwrite or earlier is not None, marker=RECORD)
    if not request.force:
        check_machine(bundle, guessed, out)
    job = EngineJob(
        bundle=bundle,
        target=request.target,
        compiler=compiler,
        limits=limits,
        profiles=make_profiles(bundle, limits),
        placement=placement,
        plugin=request.plugin,
        earlier=earlier,
    )
    return write_engines(job, out, progress, overwrite=request.overwrite)


@contextlib.contextmanager
def _no_folder_left(folder: Path) -> Iterator[None]:
    """When the block fails, an empty `engines` folder that it made is no output either."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _list_engines(bundle: Bundle, directory: Path, record: EngineRecord) -> None:
    """List the engines in the bundle's manifest, which stays valid. No other file is read again."""
    manifest = bundle.manifest
    folder = f"{ENGINES}/{record.target}/"
    entries = [entry for entry in manifest.files if not entry.path.startswith(folder)]
    entries += [FileEntry(folder + file.file, file.bytes, file.sha256) for file in record.files]
    written = directory / RECORD
    entries.append(FileEntry(folder + RECORD, written.stat().st_size, hash_file(written)))
    compiler = f"{record.flavour.value} {record.version}"
    sentence = f"compiled for SM {record.sm} with {compiler}; the engines were not run"
    if record.on_cpu:
        sentence += "; ONNX Runtime prunes on the CPU"
    verified = {**manifest.verified, record.target: sentence}
    entries.sort(key=lambda entry: entry.path)
    write_manifest(bundle.path, replace(manifest, files=tuple(entries), verified=verified))

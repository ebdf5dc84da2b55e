"""A bundle compiled for a target: engines, a kit that makes them on the device, or nothing for a CPU.

    checks -> profiles -> one engine a component -> engine.json -> manifest

The output is written aside and renamed into place, so that it is whole or absent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import ep_export
from ep_export.bundle import Bundle, Component, Precision, hash_file, list_files, write_manifest
from ep_export.engine.checks import (
    check_fit,
    check_graphs,
    check_machine,
    check_scorer,
    estimate_limits,
)
from ep_export.engine.compiler import compile_component, installed_version, require_compiler
from ep_export.engine.device import find_gpu
from ep_export.engine.profiles import (
    MAX_NEW_TOKENS,
    LimitsRequest,
    Profiles,
    check_top_k,
    make_profiles,
    resolve_limits,
)
from ep_export.engine.weights import without_bfloat16
from ep_export.engine.worker import Job
from ep_export.engine_record import (
    ENGINES,
    RECORD,
    EngineFile,
    EngineRecord,
    Limits,
    bundle_fingerprint,
    engine_directory,
    write_record,
)
from ep_export.errors import UsageError
from ep_export.fit import Estimate, VisionSize, estimate
from ep_export.plan import Plan
from ep_export.progress import Progress, silent
from ep_export.staging import refuse_existing, staged
from ep_export.targets import Flavour, Graphs, Target

__all__ = ["CompileRequest", "CompileResult", "Made", "check_ahead", "check_compiler", "compile_bundle"]

_SUFFIX = ".engine"


class Made(str, Enum):
    """What came of compiling."""

    ENGINES = "engines"
    KIT = "kit"
    NOTHING = "nothing"


@dataclass(frozen=True)
class CompileRequest:
    """What was asked for.

    Attributes:
        target: The device.
        limits: What engines must be able to do.
        out: Where engines or kit go; None: `engines/<target>` in the bundle.
        overwrite: Replace earlier ones.
        force: Go on although an estimate says that they do not fit.
        plugin: Library of the TensorRT plugin, for compiling in place; None: the node's body is compiled.
        model: Checkpoint that a kit's golden outputs come from; the one the bundle names when None.
        golden: Put golden outputs into a kit; the model is loaded for them.
    """

    target: Target
    limits: LimitsRequest = field(default_factory=LimitsRequest)
    out: Path | None = None
    overwrite: bool = False
    force: bool = False
    plugin: Path | None = None
    model: str | None = None
    golden: bool = True


@dataclass(frozen=True)
class CompileResult:
    """What was made.

    Attributes:
        made: Engines, a kit, or nothing.
        directory: Where; None for nothing.
        reason: Why a kit, or nothing, instead of engines; empty for engines.
        limits: What the engines are for; None for nothing.
        estimate: Memory at these limits; None without published figures.
        record: Of engines.
    """

    made: Made
    directory: Path | None
    reason: str = ""
    limits: Limits | None = None
    estimate: Estimate | None = None
    record: EngineRecord | None = None


def compile_bundle(bundle: Bundle, request: CompileRequest, progress: Progress = silent) -> CompileResult:
    """Compile every component, or write the kit that does.

    Args:
        bundle: An opened bundle. What goes into it is listed in its manifest afterwards.
        request: See `CompileRequest`.
        progress: Told about every component.

    Raises:
        UserError: The target does not take these graphs, they do not fit, the compiler is missing or failed.
        UsageError: The limits are impossible.
    """
    target = request.target
    check_graphs(bundle, target)
    if target.flavour is Flavour.ONNXRUNTIME:
        return CompileResult(Made.NOTHING, None, "ONNX Runtime runs the bundle as it is")
    if request.plugin and target.flavour is not Flavour.TENSORRT:
        raise UsageError(
            f"{target.name} is a {target.flavour.value} target, which takes no plugins",
            hint="leave out --plugin",
        )
    out = request.out or engine_directory(bundle.path, target.name)
    limits = resolve_limits(bundle, request.limits)
    reason = _why_kit(target)
    if not reason and request.plugin is None:
        check_top_k(limits, target)
        check_scorer(bundle.manifest.policy.scorer, target)
    guessed = estimate_limits(bundle, target, limits)
    if not request.force:
        check_fit(target, limits.max_prompt, guessed)
    record = None
    with _no_folder_left(out.parent):
        if reason:
            _write_kit(bundle, request, out, limits, progress)
        else:
            record = _write_engines(bundle, request, out, limits, guessed, progress)
    if request.out is None:
        _take_in(bundle, target, record)
    made = Made.ENGINES if record else Made.KIT
    return CompileResult(made, out, reason, limits, guessed, record)


def check_compiler(request: CompileRequest) -> None:
    """Refuse a target whose compiler is not here, before a bundle is built for it.

    Raises:
        UserError: See `require_compiler`.
    """
    target = request.target
    if target.flavour is not Flavour.ONNXRUNTIME and not _why_kit(target):
        require_compiler(target)


def check_ahead(request: CompileRequest, plan: Plan, vision: VisionSize, graphs: Graphs) -> None:
    """Refuse what the target cannot compute or hold, before a bundle is built for it.

    Args:
        request: What compiling will be asked for.
        plan: Of a typical picture; `compile_bundle` checks again at the limits.
        vision: Size of the encoder.
        graphs: What the bundle will have.

    Raises:
        UserError: The target does not compute the policy's score, or the model does not fit.
    """
    target = request.target
    if target.inlines_body:
        check_scorer(plan.policy.scorer, target)
    new_tokens = request.limits.max_new_tokens or MAX_NEW_TOKENS
    guessed = estimate(plan, target, vision, new_tokens=new_tokens, graphs=graphs)
    if not request.force:
        check_fit(target, plan.visual_tokens + plan.text_tokens, guessed)


def _why_kit(target: Target) -> str:
    """Why engines cannot be built on this machine; empty when they can."""
    if target.flavour is Flavour.TENSORRT_RTX:
        return ""
    gpu, found = find_gpu(), installed_version(Flavour.TENSORRT)
    if gpu is None or gpu.sm != target.sm:
        here = f"a GPU of SM {gpu.sm}" if gpu else "no GPU"
        return f"TensorRT compiles on the GPU it serves, SM {target.sm}; this machine has {here}"
    if found is None:
        return "TensorRT is not installed in this environment"
    if target.versions is not None and not target.versions.holds(found):
        return f"TensorRT here is {found}, the target has {target.versions}"
    return ""


def _write_kit(
    bundle: Bundle, request: CompileRequest, out: Path, limits: Limits, progress: Progress
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
            model=request.model,
            golden=request.golden,
        )


def _write_engines(
    bundle: Bundle,
    request: CompileRequest,
    out: Path,
    limits: Limits,
    guessed: Estimate | None,
    progress: Progress,
) -> EngineRecord:
    """Every component and the record, staged."""
    target, manifest = request.target, bundle.manifest
    compiler = require_compiler(target)
    refuse_existing(out, overwrite=request.overwrite, marker=RECORD)
    if not request.force:
        check_machine(bundle, guessed, out)
    profiles = make_profiles(bundle, limits)
    with staged(out, overwrite=request.overwrite, marker=RECORD) as aside:
        record = EngineRecord(
            target=target.name,
            sm=target.sm or "",
            flavour=target.flavour,
            version=compiler,
            cuda=target.cuda or "",
            bundle=bundle_fingerprint(manifest),
            model=manifest.model,
            dialect=manifest.dialect,
            precision=manifest.precision,
            limits=limits,
            components=_compile(bundle, request, aside, profiles, progress),
            plugin=request.plugin is not None,
            made_by={
                "ep-export": ep_export.__version__,
                target.flavour.value: compiler,
                "polygraphy": version("polygraphy"),
            },
        )
        write_record(aside, record)
    return record


def _compile(
    bundle: Bundle, request: CompileRequest, aside: Path, profiles: Profiles, progress: Progress
) -> dict[str, EngineFile]:
    """One engine a component, into `aside`."""
    target = request.target
    engines: dict[str, EngineFile] = {}
    with _preparing(bundle, request, aside) as prepare:
        for component in bundle.manifest.components:
            stage = f"compile {component.name}"
            progress(stage, 0, 1)
            file = aside / f"{component.name}{_SUFFIX}"
            job = Job(
                onnx=str(prepare(component).absolute()),
                engine=str(file.absolute()),
                flavour=target.flavour,
                sm=target.sm or "",
                profiles=profiles[component.name],
                plugin=str(request.plugin.absolute()) if request.plugin else None,
            )
            made = compile_component(job, component=component.name, target=target)
            engines[component.name] = EngineFile(
                file.name, hash_file(file), made.bytes, round(made.seconds, 2), job.profiles
            )
            progress(stage, 1, 1)
    return engines


@contextlib.contextmanager
def _preparing(bundle: Bundle, request: CompileRequest, aside: Path) -> Iterator[Callable[[Component], Path]]:
    """Component -> the file to compile: the bundle's own, or a copy changed for the target."""
    target = request.target
    with TemporaryDirectory(dir=aside) as scratch, contextlib.ExitStack() as cleaning:

        def prepare(component: Component) -> Path:
            source = bundle.file(component.file)
            if Precision.BF16 not in target.dtypes:
                return without_bfloat16(bundle, component, Path(scratch))
            if request.plugin is None or not target.strips_body:
                return source
            from ep_export.export.prune_node import strip_body

            copy = source.with_name(f".{component.name}.stripped.onnx")  # beside the weights it refers to
            cleaning.callback(copy.unlink, missing_ok=True)
            strip_body(source, copy)
            return copy

        yield prepare


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


def _take_in(bundle: Bundle, target: Target, record: EngineRecord | None) -> None:
    """List what was made in the bundle's manifest, which stays valid."""
    made = f"{ENGINES}/{target.name}/"
    known = {e.path: e.sha256 for e in bundle.manifest.files if not e.path.startswith(made)}
    known |= {made + path: sha256 for path, sha256 in known.items() if _same(bundle.path, path, made + path)}
    verified = dict(bundle.manifest.verified)
    if record:
        known |= {made + engine.file: engine.sha256 for engine in record.components.values()}
        compiler = f"{record.flavour.value} {record.version}"
        verified[target.name] = f"compiled for SM {record.sm} with {compiler}; the engines were not run"
    manifest = replace(bundle.manifest, files=list_files(bundle.path, known), verified=verified)
    write_manifest(bundle.path, manifest)


def _same(directory: Path, path: str, other: str) -> bool:
    """Whether a kit's file is a hard link to the bundle's."""
    return (directory / other).is_file() and (directory / path).samefile(directory / other)

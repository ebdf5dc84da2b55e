"""The main job: target, checkpoint, schedule, plan and fit once each, then export, validation, engines.

Enters: a `BuildRequest`. Leaves: a `BuildResult`. The steps are two, so that a person can see the plan
before time is spent: `prepare` finds out what would be done (and calibrates when only that can tell), `build`
does it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ep_export.bundle import MANIFEST, Bundle, Dialect, Precision, WeightsMode, list_files, write_manifest
from ep_export.calibrate import calibrate, plot
from ep_export.calibrate.choose import ScheduleRequest, needs_calibration, settle
from ep_export.calibrate.record import Record, write_calibration
from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.engine.compile import (
    CompileRequest,
    CompileResult,
    check_ahead,
    check_compiler,
    compile_bundle,
)
from ep_export.errors import UsageError, UserError
from ep_export.first_token import processor_settings, typical_work
from ep_export.interrupts import uninterrupted
from ep_export.measure.journal import discard
from ep_export.measure.pictures import find_pictures
from ep_export.measure.prompts import GENERIC_QUESTIONS, questions_for, read_questions
from ep_export.numerics import WeightKind, Weights
from ep_export.planning import Plan
from ep_export.policy import Evidence, Keep
from ep_export.progress import Progress, silent
from ep_export.runtime.pictures import open_picture
from ep_export.staging import refuse_existing, scratch, set_aside, staged
from ep_export.targets import Graphs
from ep_export.testcards import make_cards

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.measure.prompts import Questions
    from ep_export.validate import Report
    from ep_export.weights.packing import Packing

__all__ = [
    "BuildRequest",
    "BuildResult",
    "Prepared",
    "build",
    "pictures_and_questions",
    "prepare",
    "validate_bundle",
]

MAX_PICTURES = 8
MAX_NEW_TOKENS = 16
REPORT = "report"
NO_BF16 = "ONNX Runtime computes no bfloat16 on a CPU"
NO_BF16_HINT = "validate an fp32 bundle of the same checkpoint and policy; its graphs differ only in type"


@dataclass(frozen=True)
class BuildRequest:
    """What a build was asked for.

    Attributes:
        model: Alias, hub id or directory.
        keep: Amount kept, as an average over layers; None where the cuts say it.
        schedule: What was said about where and how to prune.
        out: The bundle to write.
        overwrite: Replace an earlier bundle.
        dialect: Operators used.
        precision: Arithmetic of the graphs.
        shards: Link or copy them.
        weights: What the decoder's linear layers are stored in; None: as the checkpoint has them.
        degree: Degree of the entropy series.
        images: Pictures to calibrate and validate on; None: test cards, for validation only.
        prompts: Questions file for the pictures.
        compile: Compile the bundle afterwards; None: do not.
    """

    model: str
    keep: Keep | None
    schedule: ScheduleRequest
    out: Path
    overwrite: bool
    dialect: Dialect
    precision: Precision
    shards: WeightsMode
    degree: int
    weights: Weights | None = None
    images: Path | None = None
    prompts: Path | None = None
    compile: CompileRequest | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything decided before the export starts; the plan holds schedule and keep."""

    request: BuildRequest
    checkpoint: Checkpoint
    evidence: Evidence
    plan: Plan
    record: Record | None


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle, the report of its validation when there was one, and what was compiled of it."""

    bundle: Bundle
    report: Report | None
    compiled: CompileResult | None = None


def prepare(request: BuildRequest, progress: Progress = silent) -> Prepared:
    """Settle target, checkpoint, schedule, plan and fit. Only a calibration writes: its journal.

    Raises:
        UserError: See `open_checkpoint`, `settle`, `calibrate`; or the output exists.
        UsageError: The keep is not within what the cuts allow.
    """
    refuse_existing(request.out, overwrite=request.overwrite, marker=MANIFEST)
    if request.compile:
        check_compiler(request.compile)
    checkpoint = open_checkpoint(request.model)
    # Whoever runs the bundle needs the processor's files: opened here, what is wrong with them is said first.
    checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    record = _fresh_record(request, checkpoint, progress)
    settled = settle(checkpoint, request.schedule, keep=request.keep, fresh=record)
    work = typical_work(checkpoint, processor_settings(checkpoint, checkpoint.path))
    plan = settled.plan(work, kv_bytes_per_element=4 if request.precision is Precision.FP32 else 2)
    if request.compile:
        graphs = Graphs(request.dialect, request.precision)
        check_ahead(request.compile, plan, graphs, _stored(request, checkpoint))
    return Prepared(request, checkpoint, settled.evidence, plan, record)


def _stored(request: BuildRequest, checkpoint: Checkpoint) -> Weights | None:
    """What linear layers will be stored in: as asked for, or as published."""
    return checkpoint.published.weights if checkpoint.published else request.weights


def build(prepared: Prepared, *, check: bool = True, progress: Progress = silent) -> BuildResult:
    """Export, validate and put the bundle into place; then compile it, when that was asked for.

    A bundle that was found different is kept, so that one can look at it; its manifest and report say FAIL.
    It is not compiled, and it does not replace an earlier one: that stays, and `NAME.failed` lies beside it.

    Args:
        prepared: From `prepare`.
        check: Validate against PyTorch before the bundle gets its name.
        progress: Told about every stage.

    Raises:
        UserError: The export or the files of the checkpoint are at fault.
    """
    from ep_export.export import export_bundle

    request = prepared.request
    with staged(request.out, overwrite=request.overwrite, marker=MANIFEST) as aside:
        bundle = export_bundle(
            prepared.checkpoint,
            aside,
            schedule=prepared.plan.schedule,
            evidence=prepared.evidence,
            keep=prepared.plan.keep,
            dialect=request.dialect,
            precision=request.precision,
            weights=request.shards,
            packing=_packing(prepared),
            degree=request.degree,
            progress=progress,
        )
        if prepared.record:
            _keep_record(bundle, prepared.record)
        check = check and request.precision is not Precision.BF16
        report = _check(bundle, prepared, progress) if check else None
        failed = report is not None and report.verdict.value == "FAIL"
        out = request.out
        if failed and _any_in(out):
            out = set_aside(aside, out, suffix="failed")
    discard(_journal(request.out))
    bundle = Bundle.open(out, verify=False)
    if request.compile is None or failed:
        return BuildResult(bundle, report)
    compiled = compile_bundle(bundle, request.compile, progress)
    return BuildResult(Bundle.open(request.out, verify=False), report, compiled)


def _any_in(out: Path) -> bool:
    """Whether there is an earlier output."""
    return out.is_dir() and any(out.iterdir())


def _packing(prepared: Prepared) -> Packing | None:
    """How linear layers are quantised: by what really enters them where there are pictures."""
    request, checkpoint = prepared.request, prepared.checkpoint
    if request.weights is None:
        return None
    if request.images is None or request.weights.kind is WeightKind.FP8:
        from ep_export.weights.packing import nearest

        return nearest(checkpoint.tensors, request.weights, compute=request.precision.value)
    from ep_export.calibrate.weights import ROUNDING_PICTURES, calibrated

    pictures, questions = pictures_and_questions(request.images, request.prompts, ROUNDING_PICTURES)
    return calibrated(checkpoint, request.weights, pictures, questions, compute=request.precision.value)


def _fresh_record(request: BuildRequest, checkpoint: Checkpoint, progress: Progress) -> Record | None:
    """Calibrate when nothing else can say where to prune and pictures were given."""
    if request.images is None or not needs_calibration(checkpoint, request.schedule):
        return None
    if request.keep is None:
        raise UsageError(
            "how much to keep is not given, and a calibration compares at one keep",
            hint="add --keep 0.25, or --keep-tokens N",
        )
    try:
        return calibrate(
            checkpoint,
            request.images,
            keep=request.keep,
            prompts=read_questions(request.prompts) if request.prompts else GENERIC_QUESTIONS,
            work=_journal(request.out),
            progress=progress,
        )
    finally:
        with contextlib.suppress(OSError):
            _journal(request.out).rmdir()  # only when it is empty: there is nothing to go on from


def _journal(out: Path) -> Path:
    """Where an interrupted calibration is taken up again by the same build; gone once the bundle stands."""
    return out.with_name(f".{out.name}.calibration")


def validate_bundle(
    bundle: Bundle,
    checkpoint: Checkpoint,
    *,
    images: Path | None = None,
    prompts: Path | None = None,
    policies: Sequence[str] = (),
    max_pictures: int = MAX_PICTURES,
    max_new_tokens: int = MAX_NEW_TOKENS,
    out: Path | None = None,
    progress: Progress = silent,
) -> Report:
    """Compare a bundle with the model it was built from and write the report.

    Args:
        bundle: The bundle.
        checkpoint: What it was built from.
        images: Folder of pictures; test cards when None.
        prompts: Questions file; generic questions when None.
        policies: See `Manifest.scheduled`.
        max_pictures: Pictures compared, the first by name.
        max_new_tokens: Longest answer compared.
        out: Directory of the report. None: the bundle's own, and its manifest records the outcome.
        progress: Told about every prompt.

    Raises:
        UserError: See `ep_export.validate.validate`; or no picture can be read.
    """
    from ep_export.validate import to_json, validate, write_html

    if bundle.manifest.precision is Precision.BF16:
        raise UserError(f"bundle {bundle.path} cannot be validated: {NO_BF16}", hint=NO_BF16_HINT)

    pictures, questions = pictures_and_questions(images, prompts, max_pictures)
    report = validate(
        bundle,
        checkpoint,
        pictures=pictures,
        prompts=questions,
        policies=policies,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    with contextlib.ExitStack() as undo:
        directory = out or undo.enter_context(scratch(bundle.path, REPORT))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "report.json").write_text(text, encoding="utf-8")
        write_html(report, directory / "report.html", pictures)
        if out is None:
            chosen = f" ({', '.join(policies)})" if policies else ""
            _move_in(bundle, directory, f"onnxruntime-cpu{chosen}", report, own=not policies)
    return report


def _move_in(bundle: Bundle, directory: Path, where: str, report: Report, *, own: bool) -> None:
    """A report into its bundle, the manifest last.

    The files it replaces are struck from the manifest first: a run that is killed in between leaves a whole
    bundle, whose report counts as not written.
    """
    files = sorted(directory.iterdir())
    names = {f"{REPORT}/{file.name}" for file in files}
    kept = tuple(entry for entry in bundle.manifest.files if entry.path not in names)
    with uninterrupted():
        write_manifest(bundle.path, replace(bundle.manifest, files=kept))
        (bundle.path / REPORT).mkdir(exist_ok=True)
        for file in files:
            file.replace(bundle.path / REPORT / file.name)
        relist(bundle).with_verified(where, report.sentence, report.rounding if own else None)


def relist(bundle: Bundle) -> Bundle:
    """The bundle with its report, and with listed files that changed, taken into its manifest.

    What somebody else put into the bundle is not taken in: listed files may be replaced and deleted.
    """
    listed = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    known = {path: digest for path, digest in listed.items() if path.startswith("weights/")}
    files = tuple(
        entry
        for entry in list_files(bundle.path, known)
        if entry.path in listed or entry.path.startswith(f"{REPORT}/")
    )
    manifest = replace(bundle.manifest, files=files)
    write_manifest(bundle.path, manifest)
    return Bundle(bundle.path, manifest)


def _check(bundle: Bundle, prepared: Prepared, progress: Progress) -> Report:
    request = prepared.request
    return validate_bundle(
        bundle, prepared.checkpoint, images=request.images, prompts=request.prompts, progress=progress
    )


def _keep_record(bundle: Bundle, record: Record) -> None:
    """The calibration a policy stands on travels with the bundle."""
    write_calibration(bundle.path / REPORT / "calibration.json", record)
    plot(record, bundle.path / REPORT / "calibration.png")
    relist(bundle)


def pictures_and_questions(
    images: Path | None, prompts: Path | None, max_pictures: int
) -> tuple[list[Image.Image], list[str]]:
    """Pictures and one question for each: those a bundle is validated on.

    Args:
        images: Folder of pictures; test cards when None.
        prompts: Questions file; generic questions when None.
        max_pictures: Pictures taken, the first by name.

    Raises:
        UserError: No picture can be read.
    """
    questions: Questions = read_questions(prompts) if prompts else GENERIC_QUESTIONS
    if images is None:
        cards = list(make_cards())
        flat = (
            [q for several in questions.values() for q in several]
            if isinstance(questions, Mapping)
            else questions
        )
        return cards, [flat[i % len(flat)] for i in range(len(cards))]
    pairs: list[tuple[Image.Image, str]] = []
    broken: list[str] = []
    for turn, file in enumerate(find_pictures(images)):
        if len(pairs) == max_pictures:
            break
        try:
            question = questions_for(questions, file.name, turn)[0]
            pairs.append((open_picture(file.path), question))
        except UserError as error:  # a folder may hold a broken file; calibration names it
            broken.append(f"{file.name}: {error}")
    if not pairs:
        raise UserError(
            f"no picture in {images} can be used; the first: {broken[0]}",
            hint="give a folder with readable pictures, and questions that match them",
        )
    return [picture for picture, _ in pairs], [question for _, question in pairs]

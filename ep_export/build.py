"""The main job as one function: checkpoint -> policy -> export -> validate -> a whole bundle or none.

Enters: a `BuildRequest`. Leaves: a `BuildResult`. The steps are two, so that a person can see the plan
before time is spent: `prepare` finds out what would be done (and calibrates when only that can tell), `build`
does it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ep_export.bundle import MANIFEST, Bundle, Dialect, Precision, WeightsMode, list_files, write_manifest
from ep_export.calibrate import GENERIC_QUESTIONS, calibrate, plot, read_questions
from ep_export.calibrate.choose import PolicyRequest, needs_calibration, resolve_policy
from ep_export.calibrate.pictures import find_pictures
from ep_export.calibrate.questions import questions_for
from ep_export.calibrate.record import Record, write_record
from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.engine.compile import (
    CompileRequest,
    CompileResult,
    check_ahead,
    check_compiler,
    compile_bundle,
)
from ep_export.errors import UserError
from ep_export.fit import vision_size
from ep_export.plan import Plan, make_plan
from ep_export.policy import Evidence, Keep, Policy
from ep_export.progress import Progress, silent
from ep_export.runtime.pictures import open_picture
from ep_export.staging import refuse_existing, staged
from ep_export.targets import Graphs
from ep_export.testcards import make_cards

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.calibrate.questions import Questions
    from ep_export.validate import Report

__all__ = ["BuildRequest", "BuildResult", "Prepared", "build", "prepare", "validate_bundle", "what_to_ask"]

TEXT_TOKENS = 86
"""Text tokens of the plan that is shown before a build: about those of the paper's benchmarks."""

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
        keep: Amount kept, as an average over layers.
        policy: What was said about the policy.
        out: The bundle to write.
        overwrite: Replace an earlier bundle.
        dialect: Operators used.
        precision: Arithmetic of the graphs.
        weights: Link or copy the shards.
        degree: Degree of the entropy series.
        images: Pictures to calibrate and validate on; None: test cards, for validation only.
        prompts: Questions file for the pictures.
        compile: Compile the bundle afterwards; None: do not.
    """

    model: str
    keep: Keep
    policy: PolicyRequest
    out: Path
    overwrite: bool
    dialect: Dialect
    precision: Precision
    weights: WeightsMode
    degree: int
    images: Path | None = None
    prompts: Path | None = None
    compile: CompileRequest | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything decided before the export starts."""

    request: BuildRequest
    checkpoint: Checkpoint
    policy: Policy
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
    """Open the checkpoint, settle the policy, plan the budgets. Only a calibration writes: its journal.

    Raises:
        UserError: See `open_checkpoint`, `resolve_policy`, `calibrate`; or the output exists.
        UsageError: The keep is below what the layer allows.
    """
    refuse_existing(request.out, overwrite=request.overwrite, marker=MANIFEST)
    if request.compile:
        check_compiler(request.compile)
    checkpoint = open_checkpoint(request.model)
    record = _fresh_record(request, checkpoint, progress)
    policy, evidence = resolve_policy(checkpoint, request.policy, fresh=record, keep=request.keep)
    plan = make_plan(
        checkpoint.dims,
        policy,
        request.keep,
        visual_tokens=checkpoint.family.default_visual_tokens(checkpoint.config),
        text_tokens=TEXT_TOKENS,
    )
    if request.compile:
        graphs = Graphs(request.dialect, request.precision)
        check_ahead(request.compile, plan, vision_size(checkpoint.config), graphs)
    return Prepared(request, checkpoint, policy, evidence, plan, record)


def build(prepared: Prepared, *, check: bool = True, progress: Progress = silent) -> BuildResult:
    """Export, validate and put the bundle into place; then compile it, when that was asked for.

    A bundle that was found different is kept, so that one can look at it; its manifest and report say FAIL.
    It is not compiled.

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
            policy=prepared.policy,
            evidence=prepared.evidence,
            keep=request.keep,
            dialect=request.dialect,
            precision=request.precision,
            weights=request.weights,
            degree=request.degree,
            progress=progress,
        )
        if prepared.record:
            _keep_record(bundle, prepared.record)
        check = check and request.precision is not Precision.BF16
        report = _check(bundle, prepared, progress) if check else None
    shutil.rmtree(_journal(request.out), ignore_errors=True)
    bundle = Bundle.open(request.out, verify=False)
    if request.compile is None or (report and report.verdict.value == "FAIL"):
        return BuildResult(bundle, report)
    compiled = compile_bundle(bundle, request.compile, progress)
    return BuildResult(Bundle.open(request.out, verify=False), report, compiled)


def _fresh_record(request: BuildRequest, checkpoint: Checkpoint, progress: Progress) -> Record | None:
    """Calibrate when nothing else can say where to prune and pictures were given."""
    if request.images is None or not needs_calibration(checkpoint, request.policy):
        return None
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

    pictures, asked = what_to_ask(images, prompts, max_pictures)
    report = validate(
        bundle, checkpoint, pictures=pictures, prompts=asked, max_new_tokens=max_new_tokens, progress=progress
    )
    directory = out or bundle.path / REPORT
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    (directory / "report.json").write_text(text, encoding="utf-8")
    write_html(report, directory / "report.html", pictures)
    if out is None:
        relist(bundle).with_verified("onnxruntime-cpu", report.sentence)
    return report


def relist(bundle: Bundle) -> Bundle:
    """The bundle with small files that were added or changed since taken into its manifest."""
    known = {entry.path: entry.sha256 for entry in bundle.manifest.files if entry.path.startswith("weights/")}
    manifest = replace(bundle.manifest, files=list_files(bundle.path, known))
    write_manifest(bundle.path, manifest)
    return Bundle(bundle.path, manifest)


def _check(bundle: Bundle, prepared: Prepared, progress: Progress) -> Report:
    request = prepared.request
    return validate_bundle(
        bundle, prepared.checkpoint, images=request.images, prompts=request.prompts, progress=progress
    )


def _keep_record(bundle: Bundle, record: Record) -> None:
    """The calibration a policy stands on travels with the bundle."""
    write_record(bundle.path / REPORT / "calibration.json", record)
    plot(record, bundle.path / REPORT / "calibration.png")
    relist(bundle)


def what_to_ask(
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
            [q for asked in questions.values() for q in asked]
            if isinstance(questions, Mapping)
            else questions
        )
        return cards, [flat[i % len(flat)] for i in range(len(cards))]
    pictures: list[Image.Image] = []
    asked: list[str] = []
    first = ""
    for turn, file in enumerate(find_pictures(images)):
        if len(pictures) == max_pictures:
            break
        try:
            asked.append(questions_for(questions, file.name, turn)[0])
            pictures.append(open_picture(file.path))
        except UserError as error:  # a folder may hold a broken file; calibration names it
            first = first or f"{file.name}: {error}"
            del asked[len(pictures) :]
    if not pictures:
        raise UserError(
            f"no picture in {images} can be used; the first: {first}",
            hint="give a folder with readable pictures, and questions that match them",
        )
    return pictures, asked

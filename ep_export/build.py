"""The main job as one function: checkpoint -> policy -> export -> validate -> a whole bundle or none.

Enters: a `BuildRequest`. Leaves: a `BuildResult`. The steps are two, so that a person can see the plan before
time is spent: `prepare` finds out what would be done (and calibrates when only that can tell), `build` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ep_export.bundle import MANIFEST, Bundle, Dialect, Precision, WeightsMode, list_files, write_manifest
from ep_export.calibrate import calibrate
from ep_export.calibrate.choose import PolicyRequest, needs_calibration, resolve_policy
from ep_export.calibrate.record import Record, write_record
from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.errors import UserError
from ep_export.plan import Plan, make_plan
from ep_export.policy import Evidence, Keep, Policy
from ep_export.progress import Progress, silent
from ep_export.staging import refuse_existing, staged

if TYPE_CHECKING:
    from ep_export.validate import Report

__all__ = ["BuildRequest", "BuildResult", "Prepared", "build", "prepare"]

TEXT_TOKENS = 86
"""Text tokens of the plan that is shown before a build: about those of the paper's benchmarks."""


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
        max_pictures: Pictures used for validation.
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
    """A finished bundle, and the report of its validation when there was one."""

    bundle: Bundle
    report: Report | None


def prepare(request: BuildRequest, progress: Progress = silent) -> Prepared:
    """Open the checkpoint, settle the policy and plan the budgets. Writes nothing but a calibration's journal.

    Raises:
        UserError: See `open_checkpoint`, `resolve_policy`, `calibrate`; or the output exists.
        UsageError: The keep is below what the layer allows.
    """
    refuse_existing(request.out, overwrite=request.overwrite, marker=MANIFEST)
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
    return Prepared(request, checkpoint, policy, evidence, plan, record)


def build(prepared: Prepared, *, check: bool = True, progress: Progress = silent) -> BuildResult:
    """Export, validate and put the bundle into place. On FAIL nothing is left, unless the caller asks otherwise.

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
        report = validate_into(bundle, prepared, progress) if check else None
    return BuildResult(Bundle.open(request.out, verify=False), report)


def _fresh_record(request: BuildRequest, checkpoint: Checkpoint, progress: Progress) -> Record | None:
    """Calibrate when nothing else can say where to prune and pictures were given."""
    if request.images is None or not needs_calibration(checkpoint, request.policy):
        return None
    return calibrate(checkpoint, request.images, keep=request.keep, progress=progress)

"""Calibration: a checkpoint and a folder of pictures in, a record out."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ep_export.adaptive import decides
from ep_export.calibrate.candidates import candidate_layers, candidate_ways, two_cut_ways
from ep_export.calibrate.detectors import layer_curve, where_detectors_agree
from ep_export.calibrate.figure import is_our_plot, plot
from ep_export.calibrate.horizon import Horizon, find_horizon, horizon_ways
from ep_export.calibrate.measuring import Measurer
from ep_export.calibrate.pictures import Usable, ask_about, figures, first_shown
from ep_export.calibrate.race import Fidelity
from ep_export.calibrate.recommend import Recommendation, recommend, table
from ep_export.calibrate.record import Provenance, Record, write_calibration
from ep_export.calibrate.statistics import floats
from ep_export.calibrate.weights import ROUNDING_PICTURES, rounded_shard
from ep_export.entropy import METRICS, Collapse, find_collapse
from ep_export.errors import UserError
from ep_export.interrupts import uninterrupted
from ep_export.measure.executors import Executor
from ep_export.measure.journal import Workplace
from ep_export.measure.pictures import find_pictures
from ep_export.measure.prompts import GENERIC_QUESTIONS, Prompts, question_of
from ep_export.measure.provenance import processor_fingerprint, tool_versions
from ep_export.measure.question import QuestionResult
from ep_export.measure.run import Announce
from ep_export.numerics import WeightKind, Weights
from ep_export.planning import check_keep
from ep_export.policy import Chooser, Cut, EvidenceKind, Keep, Schedule
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "calibrate"]

DEFAULT_MAX_NEW_TOKENS = 32
"""Long enough for a sentence; the first tokens of an answer carry most of what pruning changes."""

_MOST_QUESTIONS = 20
"""Of a record's provenance: enough to see what it was measured with."""


def calibrate(
    checkpoint: Checkpoint,
    images: Path,
    *,
    keep: Keep,
    prompts: Prompts = GENERIC_QUESTIONS,
    layers: Sequence[int] | None = None,
    also: Sequence[Chooser] = (),
    max_images: int | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    seed: int = 0,
    device: str = "cpu",
    executor: Executor | None = None,
    weights: Weights | None = None,
    out: Path | None = None,
    work: Path | None = None,
    progress: Progress = silent,
    announce: Announce = lambda _: None,
) -> Record:
    """Measure a model on pictures: layer entropies, the information horizon, and a race of schedules.

    Args:
        checkpoint: The model.
        images: Folder of pictures.
        keep: Average over layers that schedules are compared at.
        prompts: Questions asked in turn, one a picture, or file name -> questions; see `read_asked`.
        layers: Candidate layers; all that `keep` allows when None.
        also: Choosers that are raced besides those it considers by itself.
        max_images: Measure a random sample of so many.
        max_new_tokens: Length of the answers that are compared.
        seed: Of every random choice.
        device: Where torch runs, e.g. "cpu" or "cuda". On a GPU the checkpoint's own number type is used.
        executor: Who measures, e.g. `Processes(2)`; this process when None.
        weights: Measure the model with its linear layers rounded so, by what enters them on the first
            pictures; its own weights when None.
        out: Record to write, with its plot beside it as .png. Nothing is written when None.
        work: Where the journal lies, kept afterwards; when None, beside `out` and removed in the end.
        progress: Called as ("measuring", done, total), then so for every part of the race.
        announce: Told the plan and how long it will take, once that is known.

    Raises:
        UserError: No usable picture, an impossible keep or layer, or an output that cannot be written.
    """
    keep = replace(keep, adaptive=False, threshold=None)  # a threshold is fitted in the end
    check_keep(keep)
    _check_out(out)
    depth = checkpoint.dims.layers
    cut_layers = () if keep.ratio == 1 else candidate_layers(keep, depth, layers)
    pictures = find_pictures(images, most=max_images, seed=seed)
    half, everything = horizon_ways(depth)
    asked, skipped = ask_about(pictures, prompts)
    with (
        Workplace(out, work) as directory,
        rounded_shard(
            checkpoint, weights, *first_shown(asked, ROUNDING_PICTURES), progress=progress
        ) as shard,
    ):
        measurer = Measurer(
            checkpoint,
            directory,
            seed=seed,
            max_new_tokens=max_new_tokens,
            device=device,
            executor=executor,
            progress=progress,
            announce=announce,
            rounded=None if shard is None else str(shard),
        )
        usable = measurer.horizon(asked, (*half, *everything), skipped)
        horizons = [_horizon(usable.results, depth, None, seed)]
        horizons += [_horizon(usable.of_kind(kind), depth, kind, seed) for kind in usable.kinds]
        announce(horizons[0].finding)
        single = candidate_ways(cut_layers, keep, also)
        ways = (*single, *two_cut_ways(single, horizons[0], layers=depth))
        fidelity = measurer.race(usable, ways) if ways else None
        record = _record(checkpoint, keep, usable, horizons, fidelity, seed)
        record = replace(
            record,
            provenance=_provenance(usable, prompts, images.name or str(images), seed),
            adaptive=_adaptive(record, measurer, usable),
            weights=replace(weights, rounding="gptq")
            if weights and weights.kind is not WeightKind.FP8
            else weights,
        )
        if out is not None:
            _write(out, record)
    return record


def _check_out(out: Path | None) -> None:
    """Find out before hours of work, not after."""
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"{out} is a directory, expected a file to write", hint="give --out a .json file")
    picture = _plot_file(out)
    if out == picture:
        raise UserError(f"{out} is the name of the plot, not of the record", hint="give --out a .json file")
    if picture.exists() and not is_our_plot(picture):
        raise UserError(
            f"the plot would replace {picture}, which is no plot of a calibration",
            hint="give another --out, or move that file away",
        )


def _plot_file(out: Path) -> Path:
    return out.with_suffix(".png")


def _horizon(
    results: Sequence[Sequence[QuestionResult]], layers: int, kind: str | None, seed: int
) -> Horizon:
    half, everything = horizon_ways(layers)
    return find_horizon(
        (half, *figures(results, half)), (everything, *figures(results, everything)), kind=kind, seed=seed
    )


def _record(
    checkpoint: Checkpoint,
    keep: Keep,
    usable: Usable,
    horizons: Sequence[Horizon],
    fidelity: Fidelity | None,
    seed: int,
) -> Record:
    """Everything but where it comes from."""
    first = [results[0] for results in usable.results]
    queries = np.array([result.query_entropy for result in first])
    keys = np.array([result.key_entropy for result in first])
    collapse = find_collapse(queries, seed=seed)
    curves = {metric.key: np.array([result.metrics[metric.key] for result in first]) for metric in METRICS}
    metrics = tuple(layer_curve(key, values, seed=seed) for key, values in curves.items())
    recommendation = _recommendation(fidelity, collapse, seed)
    return Record(
        model=checkpoint.source,
        layers=checkpoint.dims.layers,
        query_entropy=floats(queries.mean(axis=0)),
        key_entropy=floats(keys.mean(axis=0)),
        images=len(first),
        ecl=collapse.layer,
        confidence=collapse.confidence,
        candidates=table(fidelity, keep=_ratio(keep, first), seed=seed) if fidelity else (),
        recommended=recommendation.schedule,
        provenance=Provenance(EvidenceKind.MEASURED, "", ""),
        fingerprint=checkpoint.fingerprint,
        processor=processor_fingerprint(checkpoint.processor_files),
        query_spread=floats(queries.std(axis=0)),
        key_spread=floats(keys.std(axis=0)),
        collapse_finding=collapse.finding,
        recommendation=recommendation.reason,
        recommended_confidence=recommendation.confidence,
        keep=keep,
        skipped=usable.skipped,
        metrics=metrics,
        detectors=where_detectors_agree(collapse, find_collapse(keys, seed=seed), metrics),
        horizon=horizons[0],
        horizons=tuple(horizons[1:]),
        images_needed=recommendation.images_needed,
        visual_tokens=float(np.mean([result.visual_tokens for result in first])),
    )


def _adaptive(record: Record, measurer: Measurer, usable: Usable) -> Keep | None:
    """The keep by which every picture has its own, of the best single cut whose scores can decide it."""
    single = [
        candidate
        for candidate in record.candidates
        if len(candidate.schedule.cuts) == 1 and decides(candidate.schedule.cuts[0].chooser)
    ]
    if record.keep is None or record.keep.ratio is None or not single:
        return None
    best = min(single, key=lambda candidate: (-(candidate.images or 0), candidate.kl))
    questions = [asked.questions[0] for asked in usable.asked]
    return measurer.threshold(questions, best.schedule, record.keep.ratio)


def _provenance(usable: Usable, prompts: Prompts, source: str, seed: int) -> Provenance:
    digests = [asked.questions[0].digest for asked in usable.asked]
    return Provenance(
        kind=EvidenceKind.MEASURED,
        source=f"pictures in {source}",
        date=dt.datetime.now(dt.timezone.utc).date().isoformat(),
        tools=tool_versions(),
        images_sha256=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        questions=_different(prompts)[:_MOST_QUESTIONS],
        seed=seed,
    )


def _recommendation(fidelity: Fidelity | None, collapse: Collapse, seed: int) -> Recommendation:
    if fidelity is not None:
        return recommend(fidelity, seed=seed)
    schedule = Schedule((Cut(collapse.layer or 1),))
    return Recommendation(schedule, None, "nothing is dropped at keep 1, so that all policies are the same")


def _ratio(keep: Keep, first: Sequence[QuestionResult]) -> float:
    """The keep ratio measured, on average over pictures."""
    if keep.ratio is not None:
        return keep.ratio
    tokens = keep.tokens or 0
    return float(np.mean([min(1.0, tokens / result.visual_tokens) for result in first]))


def _different(prompts: Prompts) -> tuple[str, ...]:
    lists = prompts.values() if isinstance(prompts, Mapping) else [prompts]
    texts = (question_of(entry) for entries in lists for entry in entries)
    return tuple(dict.fromkeys(text for text in texts if text))


def _write(out: Path, record: Record) -> None:
    """Record and plot, both aside before either is renamed: a failure leaves what was there."""
    picture = _plot_file(out)
    record_aside, picture_aside = (file.with_name(f".{file.name}.new") for file in (out, picture))
    try:
        write_calibration(record_aside, record)
        plot(record, picture_aside)
        with uninterrupted():
            picture_aside.replace(picture)
            record_aside.replace(out)
    finally:
        record_aside.unlink(missing_ok=True)
        picture_aside.unlink(missing_ok=True)

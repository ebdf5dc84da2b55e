"""A sweep: one model, one set of questions, many ways of pruning; a directory with the record out.

The order: what a calibration recommends, then all questions (`asking`), then prefill times and the gallery.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from ep_export.adaptive import adaptive_schedule
from ep_export.errors import UserError
from ep_export.measure.bench import Bench, Setting, gpus_of, make_bench
from ep_export.measure.journal import Workplace
from ep_export.measure.provenance import tool_versions
from ep_export.measure.question import Question, QuestionResult, Skipped
from ep_export.measure.run import Announce, measure_all
from ep_export.planning import check_keep
from ep_export.policy import ADAPTIVE, Keep
from ep_export.progress import Progress, silent
from ep_export.staging import refuse_existing, staged
from ep_export.sweep.compared import Compared, able_methods, compared_ways
from ep_export.sweep.gallery import gallery
from ep_export.sweep.options import SweepOptions
from ep_export.sweep.questions import find_questions
from ep_export.sweep.recommended import recommendations
from ep_export.sweep.record import (
    RANDOM,
    SCHEDULE,
    SWEEP_FILE,
    AnsweredQuestion,
    Dataset,
    Recommended,
    SweepRecord,
    write_sweep,
)
from ep_export.sweep.report import write_report
from ep_export.sweep.rounded_weights import rounded_models, sweep_weights, weights_name
from ep_export.sweep.rows import entropies, in_hindsight, method_infos, rounded_unpruned, rows, unpruned
from ep_export.sweep.statistics import Sampling, wilson
from ep_export.sweep.timing import time_prefill

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint
    from ep_export.measure.prompts import Prompts
    from ep_export.numerics import Weights

__all__ = ["sweep"]

_T = TypeVar("_T")

_FEW_PICTURES = 100
"""Fewer leave an interval of 20 points at a share of one half."""

_TIMED_ROUNDS = 3
"""Measurements a prompt and way; the median of three leaves out one disturbance."""


@dataclass(frozen=True)
class _Measured:
    """What was compared, what was asked, and what came of it."""

    compared: Sequence[Compared]
    answered: Sequence[tuple[Question, QuestionResult]]
    skipped: Sequence[Skipped]
    recommended: Sequence[Recommended]
    notes: Sequence[str]
    weights: Sequence[Weights]

    @property
    def results(self) -> list[QuestionResult]:
        """In the order of the questions."""
        return [result for _, result in self.answered]


def sweep(
    checkpoint: Checkpoint,
    images: Path,
    prompts: Prompts | None,
    *,
    out: Path,
    options: SweepOptions,
    overwrite: bool = False,
    progress: Progress = silent,
    announce: Announce = lambda _: None,
) -> SweepRecord:
    """Compare ways of pruning one model on a folder of pictures.

    Args:
        checkpoint: The model.
        images: Folder of pictures.
        prompts: Questions, with or without answers; see `read_prompts`. General ones when None.
        out: Directory to write: `sweep.json`, its report and the gallery's pictures.
        options: What is compared.
        overwrite: Replace an earlier sweep.
        progress: Called as ("asking", done, total) and for the other stages.
        announce: Told the plan before the work, and how long it will take.

    Returns:
        The record that was written.

    Raises:
        UserError: Nothing can be asked, an impossible keep or layer, or an output that cannot be written.
    """
    refuse_existing(out, overwrite=overwrite, marker=SWEEP_FILE)
    started = time.monotonic()
    for keep in options.keeps:
        check_keep(Keep(ratio=keep))
    compared, _ = _compared(checkpoint, options, ())  # refuses early
    questions, skipped = find_questions(images, prompts, most=options.max_questions, seed=options.seed)
    announce(_plan(options, compared, questions, skipped))
    weights = sweep_weights(options)
    with Workplace(out) as work, rounded_models(checkpoint, weights, options, progress=progress) as beside:
        recommended = _recommended(checkpoint, options, questions, work, progress)
        compared, notes = _compared(checkpoint, options, recommended)
        compared = (*compared, *(replace(one, weights=w.name) for w in beside for one in compared))
        bench = make_bench(checkpoint, replace(_setting(options, compared), beside=beside))
        outcomes = measure_all(
            checkpoint,
            bench.setting,
            questions,
            work=work,
            executor=options.executor,
            stage="asking",
            bench=bench,
            progress=progress,
            announce=announce,
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, Skipped)]
        answered = [
            (question, outcome)
            for question, outcome in zip(questions, outcomes, strict=True)
            if isinstance(outcome, QuestionResult)
        ]
        if not answered:
            raise UserError(
                f"none of the {len(questions)} questions can be used; "
                f"the first: {refused[0].name}: {refused[0].reason}",
                hint="give readable pictures, and answers the model's tokenizer can write",
            )
        compared, impossible = _everywhere(compared, [result for _, result in answered])
        notes = (*_scarce(answered), *notes, *impossible)
        measured = _Measured(compared, answered, [*skipped, *refused], recommended, notes, weights)
        with staged(out, overwrite=overwrite, marker=SWEEP_FILE) as aside:
            name = images.name or str(images)
            record = _record(bench, options, measured, name, aside, started, progress)
            write_sweep(aside, record)
            write_report(aside, record)
    return record


def _recommended(
    checkpoint: Checkpoint,
    options: SweepOptions,
    questions: Sequence[Question],
    work: Path,
    progress: Progress,
) -> tuple[Recommended, ...]:
    if options.calibration is None:
        return ()
    return recommendations(
        checkpoint,
        options.calibration,
        options.keeps,
        pictures=frozenset(question.digest for question in questions),
        seed=options.seed,
        device=options.device,
        executor=options.executor,
        work=work,
        progress=progress,
    )


def _compared(
    checkpoint: Checkpoint, options: SweepOptions, recommended: Sequence[Recommended]
) -> tuple[tuple[Compared, ...], tuple[str, ...]]:
    methods, blind = able_methods(checkpoint.family, checkpoint.config, options.methods)
    compared, notes = compared_ways(
        options.keeps,
        checkpoint.dims.layers,
        options.layers,
        methods,
        recommended={one.keep: one.schedule for one in recommended if one.schedule is not None},
        adaptive={
            one.keep: (adaptive_schedule(one.threshold.threshold), one.threshold)
            for one in recommended
            if one.threshold is not None and one.threshold.threshold is not None
        },
        schedule=options.schedule,
    )
    return compared, (*blind, *notes)


def _everywhere(
    compared: Sequence[Compared], results: Sequence[QuestionResult]
) -> tuple[tuple[Compared, ...], tuple[str, ...]]:
    """What was possible on every question, and a note for what was not."""
    missing = {one: sum(one.key not in result.ways for result in results) for one in dict.fromkeys(compared)}
    notes = tuple(
        f"{one.method} at keep {one.keep:g} is left out: no picture is small enough on {count} of "
        f"{len(results)} questions"
        for one, count in missing.items()
        if count and one.weights is None
    )
    return tuple(one for one in compared if not missing[one]), notes


def _scarce(answered: Sequence[tuple[Question, QuestionResult]]) -> tuple[str, ...]:
    """A warning where so few pictures were asked about that most differences cannot be seen."""
    pictures = len({question.digest for question, _ in answered})
    if pictures >= _FEW_PICTURES:
        return ()
    low, high = wilson(pictures / 2, pictures)
    warning = (
        f"ONLY {pictures} PICTURES: a share of 50% may be anything from {low:.0%} to {high:.0%}, so that "
        f"most differences here are chance; ask about {_FEW_PICTURES} or more"
    )
    return (warning,)


def _setting(options: SweepOptions, compared: Sequence[Compared]) -> Setting:
    return Setting(
        ways=tuple(dict.fromkeys(one.way for one in compared)),
        draws=options.seeds,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        max_pixels=options.max_pixels,
    )


def _plan(
    options: SweepOptions,
    compared: Sequence[Compared],
    questions: Sequence[Question],
    skipped: Sequence[Skipped],
) -> str:
    setting = _setting(options, compared)
    names = [weights_name(one) for one in sweep_weights(options)]
    runs = len(questions) * (1 + len(names)) * sum(setting.draws_of(way) for way in setting.ways)
    on_all = f" on full, {' and '.join(names)} weights" if names else ""
    left_out = f" ({len(skipped)} left out)" if skipped else ""
    methods, places = {one.method for one in compared}, {(one.layer, one.keep) for one in compared}
    more = "" if options.calibration is None else ", and what a calibration recommends"
    return (
        f"{len(questions)} questions{left_out} x {len(setting.ways)} ways of pruning{on_all} = {runs:,} "
        f"pruned answers; ways: {len(methods)} methods, {len(places)} pairs of layer and keep{more}"
    )


def _record(
    bench: Bench,
    options: SweepOptions,
    measured: _Measured,
    name: str,
    out: Path,
    started: float,
    progress: Progress,
) -> SweepRecord:
    checkpoint, results = bench.checkpoint, measured.results
    questions = [question for question, _ in measured.answered]
    timed = _spread(questions, options.timed_prompts)
    ways = tuple(dict.fromkeys(one.way for one in measured.compared))
    timings = time_prefill(bench, timed, ways, rounds=_TIMED_ROUNDS, progress=progress) if timed else None
    sampling = Sampling(_picture_numbers(questions), seed=options.seed)
    return SweepRecord(
        model=checkpoint.source,
        fingerprint=checkpoint.fingerprint,
        family=checkpoint.family.name,
        layers=checkpoint.dims.layers,
        dims=checkpoint.dims,
        tools=tool_versions(),
        date=dt.datetime.now(dt.timezone.utc).date().isoformat(),
        machine=_machine(options.device),
        seed=options.seed,
        dataset=_dataset(name, questions, measured.skipped),
        keeps=tuple(sorted(options.keeps, reverse=True)),
        swept_layers=tuple(sorted({one.layer for one in measured.compared})),
        methods=method_infos(measured.compared, options.schedule),
        unpruned=unpruned(
            results,
            dims=checkpoint.dims,
            sampling=sampling,
            prefill_ms=timings.full_ms if timings else None,
        ),
        entropies=entropies(results, seed=options.seed),
        recommended=tuple(
            in_hindsight(one, measured.compared, results, sampling) for one in measured.recommended
        ),
        rows=rows(
            measured.compared,
            results,
            dims=checkpoint.dims,
            sampling=sampling,
            prefill=timings.ways if timings else {},
        ),
        questions=tuple(
            AnsweredQuestion(
                q.picture.name, q.text, q.answers[0] if q.answers else None, result.full_answer, q.kind
            )
            for q, result in measured.answered
        ),
        gallery=gallery(
            bench,
            _spread(measured.answered, options.gallery_pictures),
            _shown([one for one in measured.compared if one.weights is None], measured.recommended),
            out,
            progress=progress,
        ),
        seconds=time.monotonic() - started,
        notes=tuple(measured.notes),
        scarce=bool(_scarce(measured.answered)),
        rounded=tuple(
            rounded_unpruned(weights_name(one), one, results, sampling) for one in measured.weights
        ),
    )


def _dataset(name: str, questions: Sequence[Question], skipped: Sequence[Skipped]) -> Dataset:
    return Dataset(
        name=name,
        questions=len(questions),
        pictures=len({question.digest for question in questions}),
        answers=bool(questions[0].answers),
        skipped=tuple(skipped),
        sha256=hashlib.sha256("\n".join(question.key for question in questions).encode()).hexdigest(),
    )


def _shown(compared: Sequence[Compared], recommended: Sequence[Recommended]) -> list[Compared]:
    """What the gallery shows: every method once a keep, at the recommended layer, else at the first there is.

    Methods that prune before the decoder are shown there too.
    """
    shown: list[Compared] = []
    layers = {one.keep: one.schedule.cuts[0].layer for one in recommended if one.schedule is not None}
    for keep in dict.fromkeys(one.keep for one in compared):
        here = [one for one in compared if one.keep == keep and one.way.scaling is None]
        layer = layers.get(keep) or min((one.layer for one in here if one.layer > 0), default=0)
        always = [
            one
            for one in here
            if one.method in {SCHEDULE, ADAPTIVE} or (one.layer == 0 and one.method != RANDOM)
        ]
        shown += [one for one in here if one.layer == layer or one in always]
    return shown


def _spread(items: Sequence[_T], most: int) -> list[_T]:
    """At most so many, at equal distances."""
    if most <= 0:
        return []
    picks = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in dict.fromkeys(picks.tolist())]


def _picture_numbers(questions: Sequence[Question]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    known: dict[str, int] = {}
    return np.array([known.setdefault(question.digest, len(known)) for question in questions], dtype=np.int64)


def _machine(device: str) -> str:
    if gpus_of(device):
        return torch.cuda.get_device_name(None if device.startswith("auto") else device)
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

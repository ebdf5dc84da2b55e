"""Calibration: a checkpoint and a folder of pictures in, a record out."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ep_export.calibrate.candidates import RANDOM_DRAWS, candidate_layers, candidate_ways
from ep_export.calibrate.figure import is_our_plot, plot
from ep_export.calibrate.recommend import Fidelity, Recommendation, recommend, table
from ep_export.calibrate.record import Provenance, Record, write_calibration
from ep_export.entropy import Collapse, find_collapse
from ep_export.errors import UserError
from ep_export.measure.bench import Setting
from ep_export.measure.journal import Workplace
from ep_export.measure.pictures import PictureFile, find_pictures
from ep_export.measure.prompts import GENERIC_QUESTIONS, Questions, questions_for
from ep_export.measure.provenance import processor_fingerprint, tool_versions
from ep_export.measure.question import Question, QuestionResult, Skipped
from ep_export.measure.run import Announce, Outcome, measure_all
from ep_export.plan import check_keep
from ep_export.policy import Cut, EvidenceKind, Keep, Schedule
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ep_export.checkpoint import Checkpoint

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "calibrate"]

DEFAULT_MAX_NEW_TOKENS = 32
"""Long enough for a sentence; the first tokens of an answer carry most of what pruning changes."""

_MOST_QUESTIONS = 20
"""Of a record's provenance: enough to see what it was measured with."""


@dataclass(frozen=True)
class _Measured:
    """All pictures that could be used, each with the results of its questions; and those that could not."""

    pictures: Mapping[str, Sequence[QuestionResult]]  # SHA-256 -> results
    skipped: tuple[str, ...]


def calibrate(
    checkpoint: Checkpoint,
    images: Path,
    *,
    keep: Keep,
    prompts: Questions = GENERIC_QUESTIONS,
    layers: Sequence[int] | None = None,
    max_images: int | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    seed: int = 0,
    device: str = "cpu",
    jobs: int = 1,
    out: Path | None = None,
    work: Path | None = None,
    progress: Progress = silent,
    announce: Announce = lambda _: None,
) -> Record:
    """Measure a model on pictures: layer entropies, and how faithful each way of pruning is.

    Args:
        checkpoint: The model.
        images: Folder of pictures.
        keep: Average over layers that ways are compared at.
        prompts: Questions asked in turn, one a picture, or file name -> questions; see `read_questions`.
        layers: Candidate layers; all that `keep` allows when None.
        max_images: Measure a random sample of so many.
        max_new_tokens: Length of the answers that are compared.
        seed: Of every random choice.
        device: Where torch runs, e.g. "cpu" or "cuda". On a GPU the checkpoint's own number type is used.
        jobs: Processes; each holds the model.
        out: Record to write, with its plot beside it as .png. Nothing is written when None.
        work: Where the journal lies, kept afterwards; when None, beside `out` and removed in the end.
        progress: Called as ("calibrating", done, total).
        announce: Told how long it will take, once that is known.

    Raises:
        UserError: No usable picture, an impossible keep or layer, or an output that cannot be written.
    """
    check_keep(keep)
    _check_out(out)
    cut_layers = () if keep.ratio == 1 else candidate_layers(keep, checkpoint.dims.layers, layers)
    setting = Setting(
        ways=candidate_ways(cut_layers, keep),
        draws=RANDOM_DRAWS,
        seed=seed,
        max_new_tokens=max_new_tokens,
        device=device,
    )
    pictures = find_pictures(images, most=max_images, seed=seed)
    with Workplace(out, work) as directory:
        questions, skipped = _questions(pictures, prompts)
        outcomes = measure_all(
            checkpoint,
            setting,
            questions,
            work=directory,
            jobs=jobs,
            stage="calibrating",
            progress=progress,
            announce=announce,
        )
        measured = _by_picture(questions, outcomes, skipped)
        record = _record(checkpoint, setting, keep, measured, prompts, images.name or str(images))
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


def _questions(
    pictures: Sequence[PictureFile], prompts: Questions
) -> tuple[tuple[Question, ...], list[Skipped]]:
    """What is asked of pictures that can be read.

    One seen twice is left out: it would narrow every interval without adding evidence.
    """
    questions: list[Question] = []
    skipped: list[Skipped] = []
    names: dict[str, str] = {}  # SHA-256 -> picture
    for turn, picture in enumerate(pictures):
        try:
            digest = picture.sha256()
            texts = questions_for(prompts, picture.name, turn)
        except (OSError, UserError) as error:
            skipped.append(Skipped(picture.name, str(error)))
            continue
        if digest in names:
            skipped.append(Skipped(picture.name, f"the same picture as {names[digest]}"))
            continue
        names[digest] = picture.name
        questions += [Question(picture, digest, text) for text in texts]
    return tuple(questions), skipped


def _by_picture(
    questions: Sequence[Question], outcomes: Sequence[Outcome], skipped: Sequence[Skipped]
) -> _Measured:
    """Results picture by picture; one with a question that cannot be used is left out whole.

    Raises:
        UserError: No picture can be used.
    """
    results: dict[str, list[QuestionResult]] = {}
    unusable = {one.name: one for one in skipped}
    refused: set[str] = set()
    for question, outcome in zip(questions, outcomes, strict=True):
        if isinstance(outcome, Skipped):
            refused.add(question.digest)
            unusable.setdefault(question.picture.name, Skipped(question.picture.name, outcome.reason))
        else:
            results.setdefault(question.digest, []).append(outcome)
    named = tuple(f"{one.name}: {one.reason}" for _, one in sorted(unusable.items()))
    usable = {digest: several for digest, several in results.items() if digest not in refused}
    if not usable:
        message = f"none of the {len(named)} pictures can be used; the first: {named[0]}"
        raise UserError(message, hint="give a folder with readable pictures, and questions that match them")
    return _Measured(usable, named)


def _record(
    checkpoint: Checkpoint,
    setting: Setting,
    keep: Keep,
    measured: _Measured,
    prompts: Questions,
    source: str,
) -> Record:
    pictures = list(measured.pictures.values())
    queries = np.array([results[0].query_entropy for results in pictures])
    keys = np.array([results[0].key_entropy for results in pictures])
    collapse = find_collapse(queries, seed=setting.seed)
    fidelity = _fidelity(setting, keep, pictures)
    recommendation = _recommendation(fidelity, collapse, setting.seed)
    return Record(
        model=checkpoint.source,
        layers=checkpoint.dims.layers,
        query_entropy=_floats(queries.mean(axis=0)),
        key_entropy=_floats(keys.mean(axis=0)),
        images=len(pictures),
        ecl=collapse.layer,
        confidence=collapse.confidence,
        candidates=table(fidelity, keep=_ratio(keep, pictures), seed=setting.seed) if fidelity.ways else (),
        recommended=recommendation.schedule,
        provenance=Provenance(
            kind=EvidenceKind.MEASURED,
            source=f"pictures in {source}",
            date=dt.datetime.now(dt.timezone.utc).date().isoformat(),
            tools=tool_versions(),
            images_sha256=hashlib.sha256("\n".join(measured.pictures).encode()).hexdigest(),
            questions=_different(prompts)[:_MOST_QUESTIONS],
            seed=setting.seed,
        ),
        fingerprint=checkpoint.fingerprint,
        processor=processor_fingerprint(checkpoint.processor_files),
        query_spread=_floats(queries.std(axis=0)),
        key_spread=_floats(keys.std(axis=0)),
        collapse_finding=collapse.finding,
        recommendation=recommendation.reason,
        recommended_confidence=recommendation.confidence,
        keep=keep,
        skipped=measured.skipped,
    )


def _fidelity(setting: Setting, keep: Keep, pictures: Sequence[Sequence[QuestionResult]]) -> Fidelity:
    """Ways measured on every picture, as matrices; every answer position of a picture weighs the same.

    Raises:
        UserError: There are ways, but none was possible on every picture.
    """
    everywhere = set.intersection(*(set(result.ways) for results in pictures for result in results))
    ways = tuple(way for way in setting.ways if way.key in everywhere)
    if setting.ways and not ways:
        raise UserError(
            f"keep {keep} is impossible on every layer for some picture",
            hint="keep more tokens, or leave out the largest pictures",
        )
    kl = [[_mean(results, way.key, "kl") for way in ways] for results in pictures]
    agreement = [[_mean(results, way.key, "agreement") for way in ways] for results in pictures]
    return Fidelity(ways=ways, kl=np.array(kl), agreement=np.array(agreement))


def _mean(results: Sequence[QuestionResult], key: str, figure: str) -> float:
    """Over the answer positions of one picture's questions, and over draws."""
    means = [float(np.mean(getattr(result.ways[key], figure))) for result in results]
    return float(np.average(means, weights=[result.answer_tokens for result in results]))


def _recommendation(fidelity: Fidelity, collapse: Collapse, seed: int) -> Recommendation:
    if fidelity.ways:
        return recommend(fidelity, seed=seed)
    schedule = Schedule((Cut(collapse.layer or 1),))
    return Recommendation(schedule, None, "nothing is dropped at keep 1, so that all policies are the same")


def _ratio(keep: Keep, pictures: Sequence[Sequence[QuestionResult]]) -> float:
    """The keep ratio measured, on average over pictures."""
    if keep.ratio is not None:
        return keep.ratio
    tokens = keep.tokens or 0
    return float(np.mean([min(1.0, tokens / results[0].visual_tokens) for results in pictures]))


def _different(prompts: Questions) -> tuple[str, ...]:
    lists = prompts.values() if isinstance(prompts, Mapping) else [prompts]
    return tuple(dict.fromkeys(question for texts in lists for question in texts))


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _write(out: Path, record: Record) -> None:
    """Record and plot, both aside before either is renamed: a failure leaves what was there."""
    picture = _plot_file(out)
    record_aside, picture_aside = (file.with_name(f".{file.name}.new") for file in (out, picture))
    try:
        write_calibration(record_aside, record)
        plot(record, picture_aside)
        picture_aside.replace(picture)
        record_aside.replace(out)
    finally:
        record_aside.unlink(missing_ok=True)
        picture_aside.unlink(missing_ok=True)

"""All questions: from the journal where they were asked before, else asked now by an executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from ep_export.measure.bench import Bench, Setting
from ep_export.measure.executors import Executor, InProcess, Job, Outcome, Unit
from ep_export.measure.journal import Journal, journal_settings, open_journal
from ep_export.measure.question import Question, QuestionResult
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint

__all__ = ["Announce", "Outcome", "measure_all"]

Announce = Callable[[str], None]
"""Called with a sentence for the person who waits."""

_ESTIMATE_AFTER = 10
"""Questions that are timed before the time that is left is told."""


def measure_all(
    checkpoint: Checkpoint,
    setting: Setting,
    questions: Sequence[Question],
    *,
    work: Path,
    executor: Executor | None = None,
    stage: str = "measuring",
    bench: Bench | None = None,
    progress: Progress = silent,
    announce: Announce = lambda _: None,
) -> tuple[Outcome, ...]:
    """Ask every question in every way.

    Args:
        checkpoint: The model.
        setting: What is measured.
        questions: What is asked.
        work: Where the journal lies. It is one for all executors: any goes on with what another began.
        executor: Who asks; this process when None.
        stage: What progress calls this.
        bench: The same setting with the model loaded, where there is one already.
        progress: Called as (stage, done, total), over all workers.
        announce: Told how long it will take, once that is known.

    Returns:
        For every question its result, or why it cannot be used.

    Raises:
        UserError: See `Executor.run`; or the journal cannot be written.
    """
    with open_journal(work, journal_settings(checkpoint, setting)) as journal:
        job = Job(checkpoint, setting, bench)
        outcomes = _measure(job, questions, journal, executor or InProcess(), stage, progress, announce)
    return tuple(outcomes[question.key] for question in questions)


def _measure(
    job: Job,
    questions: Sequence[Question],
    journal: Journal,
    executor: Executor,
    stage: str,
    progress: Progress,
    announce: Announce,
) -> Mapping[str, Outcome]:
    """The outcome of every question, by its key."""
    outcomes: dict[str, Outcome] = {}
    pending = []
    for unit in _units(questions, entropies=job.setting.entropies):
        known = journal.find(unit.question.key)
        if known is not None and (known.query_entropy or not unit.entropies):
            outcomes[known.key] = known
        else:
            pending.append(unit)
    clock = _Clock(len(pending), announce)
    progress(stage, len(questions) - len(pending), len(questions))
    if pending:
        with closing(executor.run(job, pending)) as arriving:
            for number, (unit, outcome) in enumerate(arriving, start=1):
                if isinstance(outcome, QuestionResult):
                    journal.add(outcome)
                outcomes[unit.question.key] = outcome
                progress(stage, len(questions) - len(pending) + number, len(questions))
                clock.tick(number)
    return outcomes


def _units(questions: Sequence[Question], *, entropies: bool) -> Iterator[Unit]:
    """Different questions; the entropies of a picture are measured with the first about it.

    Visual tokens stand before the question and see nothing of it.
    """
    pictures: set[str] = set()
    for question in {question.key: question for question in questions}.values():
        yield Unit(question, entropies and question.digest not in pictures)
        pictures.add(question.digest)


class _Clock:
    """Tells once how much time is left."""

    def __init__(self, tasks: int, announce: Announce) -> None:
        self._tasks = tasks
        self._announce = announce
        self._began = 0.0

    def tick(self, number: int) -> None:
        """After each question."""
        if number == 1:
            self._began = time.monotonic()  # models are loaded by now
        if number == 1 + _ESTIMATE_AFTER and self._tasks > 2 * _ESTIMATE_AFTER:
            seconds = (time.monotonic() - self._began) / _ESTIMATE_AFTER * (self._tasks - number)
            left = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
            self._announce(f"about {left} to go")

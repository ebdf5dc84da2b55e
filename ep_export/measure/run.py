"""All questions: from the journal where they were asked before, else asked now, in one process or several.

Threads that share the small products of a small model slow each other down (measured here: on two busy cores
2 threads took six times as long as 1). Questions are independent, so each process takes whole ones. A process
loads the model itself: nothing but the setting travels.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.measure.ask import measure
from ep_export.measure.bench import Bench, Setting, check_device, make_bench
from ep_export.measure.journal import Journal, journal_settings
from ep_export.measure.question import Question, QuestionResult, Skipped
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint

__all__ = ["Announce", "Outcome", "measure_all"]

Announce = Callable[[str], None]
"""Called with a sentence for the person who waits."""

Outcome = QuestionResult | Skipped

_ESTIMATE_AFTER = 10
"""Questions that are timed before the time that is left is told."""


@dataclass(frozen=True)
class _Task:
    """A question, and whether the entropies of its picture are to be measured with it."""

    question: Question
    entropies: bool


def measure_all(
    checkpoint: Checkpoint,
    setting: Setting,
    questions: Sequence[Question],
    *,
    work: Path,
    jobs: int = 1,
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
        work: Where the journal lies.
        jobs: Processes; each holds the model.
        stage: What progress calls this.
        bench: The same setting with the model loaded, where there is one already.
        progress: Called as (stage, done, total).
        announce: Told how long it will take, once that is known.

    Returns:
        For every question its result, or why it cannot be used.

    Raises:
        UserError: The device or a weight is missing, the journal cannot be written, or a process died.
    """
    journal = Journal(work, journal_settings(checkpoint, setting))
    outcomes: dict[str, Outcome] = {}
    pending = []
    for task in _tasks(questions):
        known = journal.find(task.question.key)
        if known is not None and (known.query_entropy or not task.entropies):
            outcomes[known.key] = known
        else:
            pending.append(task)
    clock = _Clock(len(pending), announce)
    progress(stage, len(questions) - len(pending), len(questions))
    with closing(_ask(checkpoint, setting, bench, pending, jobs)) as arriving:
        for number, outcome in enumerate(arriving, start=1):
            if isinstance(outcome, QuestionResult):
                journal.add(outcome)
            outcomes[pending[number - 1].question.key] = outcome
            progress(stage, len(questions) - len(pending) + number, len(questions))
            clock.tick(number)
    return tuple(outcomes[question.key] for question in questions)


def _tasks(questions: Sequence[Question]) -> Iterator[_Task]:
    """Different questions; the entropies of a picture are measured with the first about it.

    Visual tokens stand before the question and see nothing of it.
    """
    pictures: set[str] = set()
    for question in {question.key: question for question in questions}.values():
        yield _Task(question, question.digest not in pictures)
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


def _ask(
    checkpoint: Checkpoint, setting: Setting, bench: Bench | None, tasks: Sequence[_Task], jobs: int
) -> Generator[Outcome, None, None]:
    """The outcome of every task, in their order."""
    jobs = min(jobs, len(tasks))
    if not tasks:
        return
    if jobs > 1:
        check_device(setting.device)
        yield from _ask_in_processes(checkpoint.path, setting, tasks, jobs)
        return
    bench = bench or make_bench(checkpoint, setting)
    for task in tasks:
        yield _outcome(bench, task)


def _outcome(bench: Bench, task: _Task) -> Outcome:
    """Ask one question; one that cannot be used comes back with its reason."""
    try:
        return measure(bench, task.question, entropies=task.entropies)
    except (OSError, UserError) as error:
        return Skipped(task.question.name, str(error))


def _ask_in_processes(path: Path, setting: Setting, tasks: Sequence[_Task], jobs: int) -> Iterator[Outcome]:
    # spawned, not forked: a fork copies locks of threads that do not exist in it
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start, initargs=(path, setting, threads)
    )
    try:
        yield from pool.map(_outcome_here, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {jobs} processes died, probably for want of memory",
            hint="give the same command with fewer --jobs",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_here: list[Bench | UserError] = []
"""The bench of a worker process, or why it has none."""


def _start(path: Path, setting: Setting, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent answers it
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        _here.append(make_bench(open_checkpoint(str(path)), setting))
    except UserError as error:
        _here.append(error)  # told by the first task: what an initializer raises reaches nobody


def _outcome_here(task: _Task) -> Outcome:
    bench = _here[0]
    if isinstance(bench, UserError):
        raise bench
    return _outcome(bench, task)


def _leave_with_parent() -> None:
    """A killed parent cannot tell its workers: without this they would wait for questions for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""Who measures: this process, several here, or a cluster (`ep_export.measure.on_ray`). One contract.

Questions are independent, so each is a unit of work, and whoever is free takes the next. Workers load the
model themselves: nothing but the setting travels. What a lost worker had is given out again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.measure.ask import measure
from ep_export.measure.bench import Bench, Setting, check_device, make_bench
from ep_export.measure.question import Question, QuestionResult, Skipped

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint

__all__ = ["Executor", "InProcess", "Job", "Outcome", "Processes", "Unit", "open_bench", "outcome_of"]

Outcome = QuestionResult | Skipped

_MOST_FRUITLESS = 2
"""Sets of processes that may die one after the other without a single result."""


@dataclass(frozen=True)
class Unit:
    """A question, and whether the entropies of its picture are to be measured with it."""

    question: Question
    entropies: bool


@dataclass(frozen=True)
class Job:
    """What all units of a run share.

    Attributes:
        checkpoint: The model.
        setting: What is measured.
        bench: The same setting with the model loaded, where there is one already.
    """

    checkpoint: Checkpoint
    setting: Setting
    bench: Bench | None = None


class Executor(Protocol):
    """Measures units of a job, wherever it does."""

    def run(self, job: Job, units: Sequence[Unit]) -> Generator[tuple[Unit, Outcome], None, None]:
        """Measure every unit once.

        The numbers of a unit depend on nothing but the job and the unit. Closing the generator ends what it
        started, results that have not been taken are dropped.

        Args:
            job: The job.
            units: Different ones.

        Yields:
            Every unit with its result, or why it cannot be used, in the order in which they are done.

        Raises:
            UserError: The device or a weight is missing, or workers die again and again.
        """
        ...


def outcome_of(bench: Bench, unit: Unit) -> Outcome:
    """Measure one unit; a question that cannot be used comes back with its reason."""
    try:
        return measure(bench, unit.question, entropies=unit.entropies)
    except (OSError, UserError) as error:
        return Skipped(unit.question.name, str(error))


def open_bench(path: Path, setting: Setting, threads: int) -> Bench | UserError:
    """What a worker process needs, or why it has none: exceptions at the start of a process reach nobody."""
    torch.set_num_threads(threads)
    try:
        return make_bench(open_checkpoint(str(path)), setting)
    except UserError as error:
        return error


@dataclass(frozen=True)
class InProcess:
    """One unit after the other, here."""

    def run(self, job: Job, units: Sequence[Unit]) -> Generator[tuple[Unit, Outcome], None, None]:
        """See `Executor`."""
        bench = job.bench or make_bench(job.checkpoint, job.setting)
        for unit in units:
            yield unit, outcome_of(bench, unit)


@dataclass(frozen=True)
class Processes:
    """Several processes on this machine.

    Threads that share the small products of a small model slow each other down (measured: on two busy cores 2
    threads took six times as long as 1), so each process takes whole questions and its part of the threads.

    Attributes:
        jobs: So many; each holds the model.
    """

    jobs: int

    def run(self, job: Job, units: Sequence[Unit]) -> Generator[tuple[Unit, Outcome], None, None]:
        """See `Executor`. A process that dies takes the others with it: new ones do what is left."""
        check_device(job.setting.device)
        left = list(units)
        fruitless = 0
        while left:
            jobs = min(self.jobs, len(left))
            before = len(left)
            for unit, outcome in _in_processes(job, left, jobs):
                left.remove(unit)
                yield unit, outcome
            fruitless = fruitless + 1 if len(left) == before else 0
            if fruitless == _MOST_FRUITLESS:
                raise UserError(
                    f"one of {jobs} processes died, probably for want of memory",
                    hint="give the same command with fewer --jobs",
                )
            left = [*left[jobs:], *left[:jobs]]  # one of the first may have killed its process: it waits


def _in_processes(job: Job, units: Sequence[Unit], jobs: int) -> Iterator[tuple[Unit, Outcome]]:
    """What a set of processes finishes before it is through or one of them dies."""
    # spawned, not forked: a fork copies locks of threads that do not exist in it
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start, initargs=(job.checkpoint.path, job.setting, threads)
    )
    try:
        futures: dict[Future[Outcome], Unit] = {pool.submit(_outcome_here, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # Not asked to end: one that was killed may hold the lock of the queue where they would read it.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()


_here: list[Bench | UserError] = []
"""The bench of a worker process, or why it has none."""


def _start(path: Path, setting: Setting, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent answers it
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _here.append(open_bench(path, setting, threads))


def _outcome_here(unit: Unit) -> Outcome:
    bench = _here[0]
    if isinstance(bench, UserError):
        raise bench
    return outcome_of(bench, unit)


def _leave_with_parent() -> None:
    """A killed parent cannot tell its workers: without this they would wait for questions for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

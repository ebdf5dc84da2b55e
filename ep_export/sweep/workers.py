"""Questions asked in several processes at once.

Threads that share the small products of a small model slow each other down (measured here: on two busy cores
2 threads took six times as long as 1). Questions are independent, so each process takes whole ones. A process
loads the model itself: nothing but the recipe travels.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.methods import find_methods
from ep_export.sweep.calibrated import recommended_methods
from ep_export.sweep.dataset import Item
from ep_export.sweep.measure import Bench, QuestionResult, make_bench, measure
from ep_export.sweep.record import Recommended, Skipped
from ep_export.sweep.ways import Spot, ways_at

__all__ = ["Recipe", "Task", "ask", "ask_in_processes"]


@dataclass(frozen=True)
class Recipe:
    """What a process needs to set up its bench; it can be pickled.

    Attributes:
        checkpoint: Directory of the model.
        spots: Layers and keeps.
        methods: Keys of the methods.
        recommended: What calibration recommends.
        seeds: See `Bench`.
        seed: See `Bench`.
        max_new_tokens: See `Bench`.
        device: Where torch runs.
        threads: Of torch in every process.
    """

    checkpoint: Path
    spots: tuple[Spot, ...]
    methods: tuple[str, ...]
    recommended: tuple[Recommended, ...]
    seeds: int
    seed: int
    max_new_tokens: int
    device: str
    threads: int


@dataclass(frozen=True)
class Task:
    """A question, and whether the entropies of its picture are to be measured with it."""

    item: Item
    entropies: bool


def ask(bench: Bench, task: Task) -> QuestionResult | Skipped:
    """Ask one question; one that cannot be used comes back with its reason."""
    try:
        return measure(bench, task.item, entropies=task.entropies)
    except (OSError, UserError) as error:
        return Skipped(f"{task.item.picture.name}: {task.item.question}", str(error))


def ask_in_processes(
    recipe: Recipe, tasks: Sequence[Task], *, jobs: int
) -> Iterator[QuestionResult | Skipped]:
    """Ask questions in several processes.

    Args:
        recipe: The setting.
        tasks: What is asked.
        jobs: Processes.

    Yields:
        The outcome of every task, in their order.

    Raises:
        UserError: A process died.
    """
    # spawned, not forked: a fork copies locks of threads that do not exist in it
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(recipe,))
    try:
        yield from pool.map(_ask_here, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {jobs} processes died, probably for want of memory",
            hint="give the same command with fewer --jobs; it goes on where it stopped",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_here: list[Bench] = []
"""The bench of a worker process."""


def _start(recipe: Recipe) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent answers it
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(recipe.threads)
    policies = recommended_methods(recipe.recommended)
    methods = find_methods(recipe.methods)
    _here.append(
        make_bench(
            open_checkpoint(str(recipe.checkpoint)),
            spots=recipe.spots,
            ways={spot: ways_at(spot, methods, policies) for spot in recipe.spots},
            seeds=recipe.seeds,
            seed=recipe.seed,
            max_new_tokens=recipe.max_new_tokens,
            device=recipe.device,
        )
    )


def _ask_here(task: Task) -> QuestionResult | Skipped:
    return ask(_here[0], task)


def _leave_with_parent() -> None:
    """A killed parent cannot tell its workers: without this they would wait for questions for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

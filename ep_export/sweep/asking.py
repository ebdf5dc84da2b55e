"""All questions of a sweep: those the journal knows are not asked again.

Every question leaves one line, so that memory is flat in what is kept of it and an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ep_export.calibrate.journal import ResultLog
from ep_export.calibrate.run import tool_versions
from ep_export.errors import UserError
from ep_export.progress import Progress
from ep_export.sweep.dataset import Item
from ep_export.sweep.measure import Bench, QuestionResult
from ep_export.sweep.options import SweepOptions
from ep_export.sweep.record import Recommended, Skipped
from ep_export.sweep.workers import Recipe, Task, ask, ask_in_processes

__all__ = ["Announce", "Answers", "ask_all"]

Announce = Callable[[str], None]
"""Called with a sentence for the person who waits."""

_JOURNAL_VERSION = 1
"""Raised when the meaning of a journal line changes."""

_ESTIMATE_AFTER = 10
"""Questions that are timed before the time that is left is told."""


@dataclass(frozen=True)
class Answers:
    """Questions that could be asked, what came of them, and which could not."""

    items: tuple[Item, ...]
    results: tuple[QuestionResult, ...]
    skipped: tuple[Skipped, ...]


def _journal_settings(
    bench: Bench, options: SweepOptions, recommended: Sequence[Recommended]
) -> dict[str, object]:
    return {
        "version": _JOURNAL_VERSION,
        "tools": tool_versions(),
        "model": bench.checkpoint.fingerprint,
        "ways": [way.key for way in bench.all_ways],
        "recommended": [(one.keep, str(one.policy)) for one in recommended],
        "seeds": options.seeds,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "device": options.device,
    }


def ask_all(
    bench: Bench,
    options: SweepOptions,
    items: Sequence[Item],
    recommended: tuple[Recommended, ...],
    work: Path,
    progress: Progress,
    announce: Announce,
) -> Answers:
    """Every question, from the journal where it was asked before.

    Args:
        bench: The setting.
        options: The sweep's.
        items: What is asked.
        recommended: What calibration recommends.
        work: Where the journal lies.
        progress: Called as ("asking", done, total).
        announce: Told how long it will take, once that is known.

    Raises:
        UserError: No question can be used, or a process died.
    """
    journal = ResultLog(work, _journal_settings(bench, options, recommended), QuestionResult)
    seen: set[str] = set()
    tasks = [Task(item, _first(seen, item.digest)) for item in items]
    outcomes: dict[str, QuestionResult | Skipped] = {
        item.key: known for item in items if (known := journal.find(item.key)) is not None
    }
    pending = [task for task in tasks if task.item.key not in outcomes]
    began = time.monotonic()
    progress("asking", len(items) - len(pending), len(items))
    for number, outcome in enumerate(_outcomes(bench, options, recommended, pending), start=1):
        outcomes[pending[number - 1].item.key] = outcome
        if isinstance(outcome, QuestionResult):
            journal.add(outcome)
        progress("asking", len(items) - len(pending) + number, len(items))
        if number == 1:
            began = time.monotonic()  # processes have started by now
        if number == 1 + _ESTIMATE_AFTER and len(pending) > 2 * _ESTIMATE_AFTER:
            left = (time.monotonic() - began) / _ESTIMATE_AFTER * (len(pending) - number)
            announce(f"about {_duration(left)} to go")
    found = [(item, outcomes[item.key]) for item in items]
    used = [(item, outcome) for item, outcome in found if isinstance(outcome, QuestionResult)]
    skipped = tuple(outcome for _, outcome in found if isinstance(outcome, Skipped))
    if not used:
        first = f"{skipped[0].name}: {skipped[0].reason}"
        raise UserError(
            f"none of the {len(items)} questions can be used; the first: {first}",
            hint="give readable pictures, and answers the model's tokenizer can write",
        )
    return Answers(tuple(item for item, _ in used), tuple(outcome for _, outcome in used), skipped)


def _first(seen: set[str], digest: str) -> bool:
    """Whether a picture comes up for the first time: its entropies are measured once."""
    new = digest not in seen
    seen.add(digest)
    return new


def _outcomes(
    bench: Bench, options: SweepOptions, recommended: tuple[Recommended, ...], tasks: Sequence[Task]
) -> Iterator[QuestionResult | Skipped]:
    jobs = min(options.jobs, len(tasks))
    if jobs <= 1:
        return (ask(bench, task) for task in tasks)
    recipe = Recipe(
        checkpoint=bench.checkpoint.path,
        spots=bench.spots,
        methods=tuple(method.key for method in options.methods),
        recommended=recommended,
        seeds=options.seeds,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        threads=max(1, torch.get_num_threads() // jobs),
    )
    return ask_in_processes(recipe, tasks, jobs=jobs)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"

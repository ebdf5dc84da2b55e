"""What of a calibration runs the model: the horizon with all curves, and the race of schedules."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ep_export.calibrate.candidates import RANDOM_DRAWS
from ep_export.calibrate.pictures import Asked, Usable, figures, usable_pictures
from ep_export.calibrate.race import Fidelity, is_floor, legs, race
from ep_export.calibrate.record import RANDOM
from ep_export.errors import UserError
from ep_export.measure.bench import Bench, Setting, make_bench, with_setting
from ep_export.measure.executors import Executor, InProcess, Job, Outcome, Unit
from ep_export.measure.question import QuestionResult, Skipped
from ep_export.measure.run import Announce, measure_all
from ep_export.measure.thresholds import measured_threshold
from ep_export.planning import span_tokens
from ep_export.progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ep_export.checkpoint import Checkpoint
    from ep_export.measure.question import Question
    from ep_export.measure.ways import Way
    from ep_export.policy import Keep, Schedule

__all__ = ["Measurer"]


@dataclass
class _OneModel:
    """An executor that keeps its model from one setting to the next; it is loaded when first needed."""

    bench: Bench | None = None

    def run(self, job: Job, units: Sequence[Unit]) -> Generator[tuple[Unit, Outcome], None, None]:
        """See `Executor`."""
        if self.bench is None:
            self.bench = make_bench(job.checkpoint, job.setting)
        self.bench = with_setting(self.bench, job.setting)
        yield from InProcess().run(replace(job, bench=self.bench), units)


@dataclass
class Measurer:
    """Asks questions of one model; what was asked before is in the journal.

    Attributes:
        checkpoint: The model.
        work: Where the journals lie.
        seed: Of every random choice.
        max_new_tokens: Length of the answers that are compared.
        device: Where torch runs.
        executor: Who measures; this process when None.
        progress: Called as (stage, done, total).
        announce: Told the plan, and how long it will take.
        rounded: See `Setting.rounded`.
    """

    checkpoint: Checkpoint
    work: Path
    seed: int
    max_new_tokens: int
    device: str
    executor: Executor | None
    progress: Progress
    announce: Announce
    rounded: str | None = None
    _pace: float | None = field(default=None, init=False)  # seconds a token and layer, where known
    _resident: _OneModel = field(default_factory=_OneModel, init=False)

    def horizon(self, asked: Sequence[Asked], ways: Sequence[Way], skipped: Sequence[Skipped]) -> Usable:
        """Every picture once: layer entropies, metrics, and what dropping tokens layer after layer costs.

        Raises:
            UserError: No picture can be used; see also `measure_all`.
        """
        setting = self._setting(ways, curves=True)
        before = time.monotonic()
        outcomes, fresh = self._ask(setting, asked, "measuring")
        usable = usable_pictures(asked, outcomes, skipped)
        if fresh:
            done = sum(self._tokens(results, ways) for results in usable.results) * fresh
            self._pace = (time.monotonic() - before) / max(1.0, done)
        return usable

    def race(self, usable: Usable, ways: Sequence[Way]) -> Fidelity:
        """Compare schedules, the better ones on more pictures.

        Args:
            usable: The pictures.
            ways: Floors included; those that are impossible on some picture are left out.

        Raises:
            UserError: No way is possible on every picture; see also `measure_all`.
        """
        counts = {result.visual_tokens for results in usable.results for result in results}
        layers = self.checkpoint.dims.layers
        ways = [w for w in ways if all(w.fits(layers=layers, visual_tokens=count) for count in counts)]
        if not ways:
            raise UserError(
                "the keep is impossible on every layer for some picture",
                hint="keep more tokens, or leave out the largest pictures",
            )
        # pictures of one sort often stand together in a folder
        order = np.random.default_rng(self.seed).permutation(len(usable.asked))
        self.announce(self._plan(usable, ways))

        def measure(running: Sequence[Way], part: range) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            chosen = [usable.asked[order[i]] for i in part]
            setting = self._setting(running, curves=False)
            outcomes, _ = self._ask(setting, chosen, f"comparing {len(running)} schedules")
            return figures(usable_pictures(chosen, outcomes, ()).results, running)

        return race(ways, len(order), measure, seed=self.seed)

    def threshold(self, questions: Sequence[Question], schedule: Schedule, average: float) -> Keep:
        """The keep by which every picture has its own; see `measured_threshold`."""
        setting = self._setting((), curves=False)
        bench = self._resident.bench or make_bench(self.checkpoint, setting)
        bench = with_setting(bench, setting)
        return measured_threshold(bench, questions, schedule, average, progress=self.progress)

    def _setting(self, ways: Sequence[Way], *, curves: bool) -> Setting:
        return Setting(
            ways=tuple(ways),
            draws=RANDOM_DRAWS,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
            device=self.device,
            entropies=curves,
            metrics=curves,
            rounded=self.rounded,
        )

    def _ask(self, setting: Setting, asked: Sequence[Asked], stage: str) -> tuple[dict[str, Outcome], float]:
        """Outcomes by `Question.key`, and the share of them that was not in the journal."""
        questions = [question for one in asked for question in one.questions]
        known: list[int] = []

        def progress(name: str, done: int, total: int) -> None:
            known.append(done)
            self.progress(name, done, total)

        outcomes = measure_all(
            self.checkpoint,
            setting,
            questions,
            work=self.work,
            executor=self._resident if isinstance(self.executor, InProcess | None) else self.executor,
            stage=stage,
            progress=progress,
            announce=self.announce,
        )
        fresh = 1 - known[0] / max(1, len(questions)) if known else 0.0
        return {q.key: outcome for q, outcome in zip(questions, outcomes, strict=True)}, fresh

    def _plan(self, usable: Usable, ways: Sequence[Way]) -> str:
        """What the race will do, and about how long that takes."""
        contestants = sum(not is_floor(way) for way in ways)
        planned = legs(len(usable.asked), contestants)
        told = ", ".join(f"{leg.most} on {leg.images}" for leg in planned)
        pictures = "picture" if len(usable.asked) == 1 else "pictures"
        text = f"comparing {contestants} schedules, the better half on more pictures: {told} {pictures}"
        if len(planned) == 1:
            text = f"comparing {contestants} schedules on {len(usable.asked)} {pictures}"
        if self._pace is None:
            return text
        each = np.mean([self._tokens(results, ways) for results in usable.results])
        starts = [0, *(leg.images for leg in planned)]
        parts = [
            (leg.images - start) * leg.most / contestants for start, leg in zip(starts, planned, strict=False)
        ]
        seconds = self._pace * float(each) * sum(parts)
        left = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
        return f"{text}; about {left}"

    def _tokens(self, results: Sequence[QuestionResult], ways: Sequence[Way]) -> float:
        """Tokens through layers that a picture's questions cost: the unpruned pass and every way."""
        layers = self.checkpoint.dims.layers
        total = 0.0
        for one in results:
            text = one.text_tokens + one.answer_tokens
            total += layers * (one.visual_tokens + text)
            for way in ways:
                kept = way.kept(layers=layers, visual_tokens=one.visual_tokens)
                first = way.cuts[0].layer
                spans = list(span_tokens(way.schedule, layers, one.visual_tokens, kept))
                run = sum(len(span) * (visual + text) for span, visual in spans if span.start >= first)
                total += run * (RANDOM_DRAWS if any(cut.method == RANDOM for cut in way.cuts) else 1)
        return total

"""Scores of calibration pictures, from which an adaptive keep gets its threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ep_export.adaptive import fit_threshold, most_tokens
from ep_export.choosers import choose
from ep_export.measure.bench import build_prompt
from ep_export.measure.choosing import AtCut, Prompted
from ep_export.measure.full_pass import run_full
from ep_export.measure.pruned import arrivals
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ep_export.measure.bench import Bench
    from ep_export.measure.question import Question
    from ep_export.policy import Keep, Schedule

__all__ = ["measured_threshold"]


def measured_threshold(
    bench: Bench,
    questions: Sequence[Question],
    schedule: Schedule,
    average: float,
    *,
    progress: Progress = silent,
) -> Keep:
    """Run every question through the unpruned model and fit a threshold to what its visual tokens score.

    Args:
        bench: The loaded model; its ways are not read.
        questions: One a picture. Visual tokens stand before the question, so any question does.
        schedule: Of one cut.
        average: Share of the visual tokens over all layers and pictures.
        progress: Called as ("scoring", done, total).

    Raises:
        UserError: See `fit_threshold`; or a picture cannot be used.
    """
    layers, scored = bench.checkpoint.dims.layers, []
    for number, question in enumerate(questions):
        progress("scoring", number, len(questions))
        scored.append(_scores(bench, question, schedule, average))
    progress("scoring", len(questions), len(questions))
    return fit_threshold(average, schedule, scored, layers=layers)


def _scores(bench: Bench, question: Question, schedule: Schedule, average: float) -> NDArray[np.float64]:
    """[N] of one picture's visual tokens."""
    cut = schedule.cuts[0]
    prompt = build_prompt(bench, question)
    full = run_full(bench.model, bench.checkpoint.family, prompt, bench.speller.end[:1], layers=[cut.layer])
    ((_, arrival),) = arrivals(bench.decoder, full, [()], cut.layer)
    tokens = AtCut(bench, Prompted(question, prompt, full), arrival).tokens(cut.chooser)
    size = {"layers": bench.checkpoint.dims.layers, "visual_tokens": len(prompt.visual_index)}
    scores = choose(cut.chooser, tokens, most_tokens(average, schedule, **size)).scores
    if scores is None:
        raise ValueError(f"policy {cut.chooser.name} scores nothing")
    return scores.cpu().numpy()

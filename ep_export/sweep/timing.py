"""How long a decoder prefill takes, full and pruned, measured in turns.

Timed is everything from the embeddings to the logits of the prompt's last position: the layers, what a method
computes to choose, and the gather. Vision encoder and token embeddings are the same for all and left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.measure.bench import build_prompt
from ep_export.measure.choosing import AtCut, Prompted
from ep_export.measure.full_pass import run_full
from ep_export.measure.pruned import Arrival
from ep_export.measure.scaled import scaled_prompt
from ep_export.progress import Progress, silent
from ep_export.reference import SpanRecorder, run_layers, staying
from ep_export.sweep.record import Prefill

if TYPE_CHECKING:
    from ep_export.families.base import PromptInputs
    from ep_export.measure.bench import Bench
    from ep_export.measure.question import Question
    from ep_export.measure.ways import Way

__all__ = ["Timings", "time_prefill"]


@dataclass(frozen=True)
class Timings:
    """What was measured.

    Attributes:
        full_ms: Median of the unpruned prefill over prompts and rounds.
        ways: Way key -> figures.
    """

    full_ms: float
    ways: dict[str, Prefill]


def time_prefill(
    bench: Bench,
    questions: Sequence[Question],
    ways: Sequence[Way],
    *,
    rounds: int,
    progress: Progress = silent,
) -> Timings:
    """Measure every way on a few prompts.

    In every round the unpruned prefill comes once before the ways of each layer and keep, so that both sides
    see the same minute of the machine. A first round of one way each is not counted: memory is taken in it.

    Args:
        bench: The setting.
        questions: Which prompts.
        ways: What is timed, each possible on every prompt.
        rounds: Measurements a prompt.
        progress: Called as ("timing", done, total).
    """
    groups: dict[object, list[Way]] = {}
    for way in ways:
        groups.setdefault((way.cuts[0].layer if way.cuts else None, way.keep), []).append(way)
    full_ms: list[list[float]] = []
    way_ms: dict[str, list[list[float]]] = {way.key: [] for way in ways}
    progress("timing", 0, len(questions))
    for number, question in enumerate(questions, start=1):
        stand = _Stand(bench, question)
        for group in groups.values():
            stand.full(), stand.pruned(group[0])
        full_ms.append([])
        for times in way_ms.values():
            times.append([])
        for group in [*groups.values()] * rounds:
            full_ms[-1].append(stand.full())
            for way in group:
                way_ms[way.key][-1].append(stand.pruned(way))
        progress("timing", number, len(questions))
    return Timings(
        full_ms=float(np.median(np.concatenate(full_ms))),
        ways={key: _prefill(full_ms, times) for key, times in way_ms.items()},
    )


def _prefill(full_ms: Sequence[Sequence[float]], way_ms: Sequence[Sequence[float]]) -> Prefill:
    """From [prompts][rounds] milliseconds to medians; the range is that of single measurements."""
    speedups = [
        float(np.median(full)) / one for full, way in zip(full_ms, way_ms, strict=True) for one in way
    ]
    low, middle, high = np.quantile(speedups, [0.1, 0.5, 0.9])
    flat = np.concatenate(way_ms)
    return Prefill(
        full_ms=float(np.median(np.concatenate(full_ms))),
        pruned_ms=float(np.median(flat)),
        speedup=float(middle),
        speedup_low=float(low),
        speedup_high=float(high),
        samples=len(flat),
    )


class _Stand:
    """One prompt, ready to be timed."""

    def __init__(self, bench: Bench, question: Question, prompt: PromptInputs | None = None) -> None:
        self._bench = bench
        self._smaller: dict[Way, _Stand | None] = {}
        prompt = prompt or build_prompt(bench, question)
        end = bench.speller.end[:1]  # one token to predict: exactly the prompt is fed
        self._full = run_full(bench.model, bench.checkpoint.family, prompt, end, layers=())
        self._prompted = Prompted(question, prompt, self._full)

    def full(self) -> float:
        """Milliseconds of the unpruned prefill."""
        start = self._now()
        with torch.inference_mode():
            self._finish(self._run(self._full.hidden[0], range(self._layers)))
        return self._now() - start

    def pruned(self, way: Way) -> float:
        """Milliseconds of the prefill pruned that way, or about the picture scaled down."""
        if way.scaling is not None:
            smaller = self._scaled(way)
            return smaller.full() if smaller is not None else math.nan
        visual = self._full.visual_index
        counts = way.kept(layers=self._layers, visual_tokens=len(visual))
        start = self._now()
        with torch.inference_mode():
            hidden, layer = self._full.hidden[0], 0
            rows: torch.Tensor | None = None  # all
            positions = torch.arange(self._full.length, device=visual.device)
            for cut, k in zip(way.cuts, counts, strict=True):
                with ExitStack() as undo:
                    recorder = SpanRecorder(self._bench.decoder, [cut.layer])
                    recorder.install(undo)
                    hidden = self._run(hidden, range(layer, cut.layer), rows)
                projected = recorder.projected(cut.layer)
                arrival = Arrival.of(self._full, cut.layer, positions, hidden[0], projected)
                at_cut = AtCut(self._bench, self._prompted, arrival)
                rows = staying(
                    self._full.length, visual, at_cut.choose(self._bench.methods[cut.method], k, way)
                )
                hidden = hidden.index_select(1, torch.searchsorted(positions, rows))
                positions, layer = rows, cut.layer
            self._finish(self._run(hidden, range(layer, self._layers), rows))
        return self._now() - start

    def _scaled(self, way: Way) -> _Stand | None:
        if way not in self._smaller:
            question = self._prompted.question
            prompt = scaled_prompt(self._bench, question, self._prompted.prompt, way)
            self._smaller[way] = None if prompt is None else _Stand(self._bench, question, prompt)
        return self._smaller[way]

    @property
    def _layers(self) -> int:
        return len(self._bench.decoder.layers)

    def _run(self, hidden: torch.Tensor, layers: range, rows: torch.Tensor | None = None) -> torch.Tensor:
        one_set = None if rows is None else [rows]
        return run_layers(self._bench.decoder, hidden, layers, self._full.arguments, one_set)

    def _finish(self, hidden: torch.Tensor) -> None:
        """The logits of the last position."""
        self._bench.decoder.lm_head(self._bench.decoder.norm(hidden[:, -1:]))

    def _now(self) -> float:
        if self._bench.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

"""How long a decoder prefill takes, full and pruned, measured in turns.

Timed is everything from the embeddings to the logits of the prompt's last position: the layers, what a method
computes to choose, and the gather. Vision encoder and token embeddings are the same for all and left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ep_export.calibrate.fidelity import Projected, run_full, run_layers, staying
from ep_export.progress import Progress, silent
from ep_export.sweep.measure import build_prompt
from ep_export.sweep.record import Prefill
from ep_export.sweep.view import instruction_positions, token_view
from ep_export.sweep.ways import Way, keeps_after

if TYPE_CHECKING:
    from ep_export.calibrate.fidelity import FullPass
    from ep_export.families.base import PromptInputs
    from ep_export.sweep.dataset import Item
    from ep_export.sweep.measure import Bench

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


def time_prefill(bench: Bench, items: Sequence[Item], *, rounds: int, progress: Progress = silent) -> Timings:
    """Measure every way on a few prompts.

    In every round the unpruned prefill comes once before the ways of each spot, so that both sides see the
    same minute of the machine. A first round of one way a spot is not counted: memory is taken in it.

    Args:
        bench: The setting.
        items: Which prompts.
        rounds: Measurements a prompt.
        progress: Called as ("timing", done, total).
    """
    full_ms: list[list[float]] = []
    way_ms: dict[str, list[list[float]]] = {way.key: [] for spot in bench.spots for way in bench.ways[spot]}
    progress("timing", 0, len(items))
    for number, item in enumerate(items):
        stand = _Stand(bench, item)
        seen: list[float] = []
        counted: dict[str, list[float]] = {key: [] for key in way_ms}
        for turn in range(rounds + 1):
            for spot in bench.spots:
                if turn == 0:
                    stand.full(), stand.pruned(bench.ways[spot][0])
                    continue
                elapsed = [("", stand.full()), *((way.key, stand.pruned(way)) for way in bench.ways[spot])]
                for key, milliseconds in elapsed:
                    (counted[key] if key else seen).append(milliseconds)
        full_ms.append(seen)
        for key, times in counted.items():
            way_ms[key].append(times)
        progress("timing", number + 1, len(items))
    return Timings(
        full_ms=float(np.median(np.concatenate(full_ms))),
        ways={key: _prefill(full_ms, times) for key, times in way_ms.items()},
    )


def _prefill(full_ms: Sequence[Sequence[float]], way_ms: Sequence[Sequence[float]]) -> Prefill:
    """From [prompts][rounds] milliseconds to medians."""
    speedups = [float(np.median(full) / np.median(way)) for full, way in zip(full_ms, way_ms, strict=True)]
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

    def __init__(self, bench: Bench, item: Item) -> None:
        self._bench = bench
        self._prompt: PromptInputs = build_prompt(bench, item)
        checkpoint = bench.checkpoint
        self._decoder = checkpoint.family.decoder(bench.model)
        self._full: FullPass = run_full(
            bench.model,
            checkpoint.family,
            self._prompt,
            bench.speller.end[:1],  # one token to predict: exactly the prompt is fed
            layers=[0],
            heads=checkpoint.dims.heads,
            entropies=False,
        )
        self._instruction = instruction_positions(self._prompt, bench.speller.words(item.question))

    def full(self) -> float:
        """Milliseconds of the unpruned prefill."""
        start = self._now()
        with torch.inference_mode():
            self._finish(run_layers(self._decoder, self._full, self._full.hidden[0], range(self._layers)))
        return self._now() - start

    def pruned(self, way: Way) -> float:
        """Milliseconds of the prefill pruned that way."""
        layer = way.spot.layer
        k = keeps_after(way.spot, self._layers, len(self._full.visual_index))
        start = self._now()
        with torch.inference_mode(), ExitStack() as undo:
            seen: dict[str, torch.Tensor] = {}
            if layer > 0:
                self._watch(layer - 1, seen, undo)
            hidden = run_layers(self._decoder, self._full, self._full.hidden[0], range(layer))
            view = token_view(
                self._decoder,
                self._bench.checkpoint.dims,
                replace(self._full, hidden={**self._full.hidden, layer: hidden}),
                layer,
                prompt=self._prompt,
                instruction=self._instruction,
                rng=np.random.default_rng(0),
                projected=Projected(**seen) if layer > 0 else None,
            )
            rows = staying(self._full, way.method.choose(view, k))
            kept = hidden.index_select(1, rows)
            self._finish(run_layers(self._decoder, self._full, kept, range(layer, self._layers), [rows]))
        return self._now() - start

    @property
    def _layers(self) -> int:
        return len(self._decoder.layers)

    def _finish(self, hidden: torch.Tensor) -> None:
        """The logits of the last position."""
        self._decoder.lm_head(self._decoder.norm(hidden[:, -1:]))

    def _watch(self, index: int, seen: dict[str, torch.Tensor], undo: ExitStack) -> None:
        """Keep what the projections of a layer give, as the node inside a bundle would see it."""

        def keep(kind: str) -> Any:
            def hook(_linear: Any, _args: Any, output: torch.Tensor) -> None:
                seen[kind] = output[0]

            return hook

        attention: Any = self._decoder.layers[index].self_attn
        for kind in ("query", "key", "value"):
            projection = getattr(attention, f"{kind[0]}_proj")
            undo.callback(projection.register_forward_hook(keep(kind)).remove)

    def _now(self) -> float:
        if self._bench.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

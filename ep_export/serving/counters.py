"""What the engine counts, for whoever watches it."""

from __future__ import annotations

import threading
from collections import Counter

from ep_export.runtime.generate import Finish
from ep_export.serving.requests import EngineStats

__all__ = ["Counters"]


class Counters:
    """Counters that only grow, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter({finish.value: 0 for finish in Finish})
        self._first_token_seconds = 0.0

    def add(self, **amounts: int) -> None:
        """Add to fields of `EngineStats`."""
        with self._lock:
            self._totals.update(amounts)

    def add_finished(self, finish: Finish) -> None:
        """One more answer."""
        with self._lock:
            self._finished[finish.value] += 1

    def add_first_token(self, seconds: float) -> None:
        """One more answer has its first token, so long after its submission."""
        with self._lock:
            self._totals["first_tokens"] += 1
            self._first_token_seconds += seconds

    def snapshot(self, **gauges: int) -> EngineStats:
        """The counters now, with fields of `EngineStats` that go up and down."""
        with self._lock:
            return EngineStats(
                finished=dict(self._finished),
                first_token_seconds=self._first_token_seconds,
                **self._totals,
                **gauges,
            )

"""`/metrics`: the engine's counters and the requests' fates, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ep_export.serving import Engine

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Everything a server counts.

    Args:
        engine: Whose counters are read when somebody asks.

    Attributes:
        responses: Responses by path and status.
        seconds: From a request to the end of its response, by path.
        content_type: Of `text`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.responses = Counter(
            "ep_export_responses", "Responses.", ("path", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "ep_export_response_seconds",
            "From a request to the end of its response.",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's counters when it is asked: they are kept in one place only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for name, told in _COUNTERS.items():
            yield CounterMetricFamily(f"ep_export_{name}", told, value=getattr(stats, name))
        finished = CounterMetricFamily(
            "ep_export_answers", "Answers that ended, by reason.", labels=["finish"]
        )
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
        for name, told in _GAUGES.items():
            yield GaugeMetricFamily(f"ep_export_{name}", told, value=getattr(stats, name))


_COUNTERS = {
    "submitted": "Requests the engine took.",
    "refused": "Requests refused because as many waited as may.",
    "failed": "Requests that ended with an error of their own.",
    "prompt_tokens": "Tokens of all prompts.",
    "generated_tokens": "Tokens of all answers.",
    "visual_tokens": "Visual tokens of all prompts.",
    "kept_visual_tokens": "Visual tokens that reached the last span of layers.",
    "first_tokens": "Answers that have a first token.",
    "first_token_seconds": "From submission to the first token, all answers together.",
    "decode_steps": "Batched decode steps.",
}
_GAUGES = {
    "waiting": "Requests in the queue.",
    "waiting_limit": "Requests that may be in the queue.",
    "slots_in_use": "Requests being answered.",
    "slots": "Requests that may be answered at once.",
    "cache_bytes_in_use": "Keys and values reserved, in bytes.",
    "cache_bytes": "Keys and values that may be reserved, in bytes.",
}

"""Many requests to one bundle at once: continuous batching, streams, cancelling, bounded memory. No torch."""

from __future__ import annotations

from ep_export.serving.cache_memory import CacheNeed, cache_need, requests_that_fit, row_bytes
from ep_export.serving.engine import Engine
from ep_export.serving.requests import (
    Answer,
    EngineClosed,
    EngineFull,
    EngineStats,
    PromptReport,
    Request,
)
from ep_export.serving.stream import Stream

__all__ = [
    "Answer",
    "CacheNeed",
    "Engine",
    "EngineClosed",
    "EngineFull",
    "EngineStats",
    "PromptReport",
    "Request",
    "Stream",
    "cache_need",
    "requests_that_fit",
    "row_bytes",
]

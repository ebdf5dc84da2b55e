"""A bundle measured by itself, without torch: how fast, and how near to its own unpruned answers."""

from __future__ import annotations

from ep_export.benchmark.agreement import Agreement, Question, measure_agreement
from ep_export.benchmark.latency import (
    Latency,
    PrunedSide,
    Side,
    Spread,
    Stages,
    measure_latency,
    policy_name,
)

__all__ = [
    "Agreement",
    "Latency",
    "PrunedSide",
    "Question",
    "Side",
    "Spread",
    "Stages",
    "measure_agreement",
    "measure_latency",
    "policy_name",
]

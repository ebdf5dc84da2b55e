"""A bundle measured by itself, without torch: how fast, and how near to its own unpruned answers."""

from __future__ import annotations

from ep_export.benchmark.agreement import Agreement, Asked, measure_agreement
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
    "Asked",
    "Latency",
    "PrunedSide",
    "Side",
    "Spread",
    "Stages",
    "measure_agreement",
    "measure_latency",
    "policy_name",
]

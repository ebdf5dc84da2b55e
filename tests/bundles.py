"""Bundles of tiny checkpoints for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ep_export.bundle import Bundle, Dialect, Precision, WeightsMode
from ep_export.policy import Budget, Evidence, EvidenceKind, Keep, Policy, Scorer, Select, Source

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["export_tiny"]


def export_tiny(
    checkpoint: Path,
    out: Path,
    *,
    layer: int,
    keep: float = 0.75,
    scorer: Scorer = Scorer.PAPER,
    select: Select = Select.HIGHEST,
    source: Source = Source.QUERY,
    budget: Budget = Budget.JOINT,
    dialect: Dialect = Dialect.PORTABLE,
    precision: Precision = Precision.FP32,
) -> Bundle:
    """Export a checkpoint directory into `out`, which is created."""
    from ep_export.checkpoint import open_checkpoint
    from ep_export.export import export_bundle

    out.mkdir()
    return export_bundle(
        open_checkpoint(str(checkpoint)),
        out,
        policy=Policy(layer, scorer, select, source, budget),
        evidence=Evidence(EvidenceKind.TOLD, "a test"),
        keep=Keep(ratio=keep),
        dialect=dialect,
        precision=precision,
        weights=WeightsMode.LINK,
    )

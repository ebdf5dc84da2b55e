"""Bundles of tiny checkpoints for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ep_export.bundle import Bundle, Dialect, Precision, WeightsMode
from ep_export.policy import Chooser, Cut, Evidence, EvidenceKind, Keep, Schedule, TopK

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ep_export.weights.packing import Packing

__all__ = ["export_tiny", "two_cuts"]


def export_tiny(
    checkpoint: Path,
    out: Path,
    *,
    layer: int = 1,
    chooser: Chooser | None = None,
    schedule: Schedule | None = None,
    keep: float = 0.75,
    policies: Sequence[Chooser] = (),
    dialect: Dialect = Dialect.PORTABLE,
    precision: Precision = Precision.FP32,
    weights: WeightsMode = WeightsMode.LINK,
    packing: Packing | None = None,
) -> Bundle:
    """Export a checkpoint directory into `out`, which is created.

    Args:
        checkpoint: The directory.
        out: Must not exist.
        layer: Of the one cut, where no schedule is given.
        chooser: Of the one cut; without, the default one.
        schedule: In place of the one cut.
        keep: Default of the bundle.
        policies: Further choosers at every cut.
        dialect: Operators.
        precision: Arithmetic type.
        weights: Link or copy.
        packing: How linear layers are quantised; None: not.
    """
    from ep_export.checkpoint import open_checkpoint
    from ep_export.export import export_bundle

    out.mkdir()
    return export_bundle(
        open_checkpoint(str(checkpoint)),
        out,
        schedule=schedule or Schedule((Cut(layer, chooser or TopK()),)),
        evidence=Evidence(EvidenceKind.TOLD, "a test"),
        keep=Keep(ratio=keep),
        dialect=dialect,
        precision=precision,
        weights=weights,
        packing=packing,
        policies=policies,
    )


def two_cuts(
    first: int, second: int, *choosers: Chooser, shares: tuple[float, float] = (0.6, 0.3)
) -> Schedule:
    """A schedule of two cuts; `choosers` is none (the default at both), or one for each."""
    pairs = zip((first, second), choosers or (TopK(), TopK()), shares, strict=True)
    return Schedule(tuple(Cut(layer, chooser, share) for layer, chooser, share in pairs))

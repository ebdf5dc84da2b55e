"""How a bundle's kept set differs from the exact scores' choice."""

from __future__ import annotations

import numpy as np

from ep_export.bundle import Manifest
from ep_export.entropy import KeptDifference, approximation_spread, kept_difference, series_scores
from ep_export.reference import PruneTrace

__all__ = ["difference_from_exact"]

EXACT_TOLERANCE = 2e-6  # float32 scores of the same formula, in the same unit


def difference_from_exact(trace: PruneTrace, kept: np.ndarray, manifest: Manifest) -> KeptDifference:
    """Compare `kept`, visual positions, with the oracle's; near-ties are what the series itself may swap."""
    policy = manifest.policy
    index, theirs = trace.visual_index.numpy(), trace.kept_index.numpy()
    ours = series_scores(trace.states, policy.scorer, manifest.degree)
    return kept_difference(
        trace.scores,
        theirs[np.isin(theirs, index)],
        kept,
        kept.shape[0],
        visual_index=index,
        select=policy.select,
        budget=policy.budget,
        tolerance=approximation_spread(trace.scores, ours) + EXACT_TOLERANCE,
    )

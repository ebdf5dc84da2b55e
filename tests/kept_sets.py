"""How a bundle's kept set differs from the exact choice."""

from __future__ import annotations

import numpy as np
import torch

from ep_export.choosers import EXACT_TOLERANCE, KeptDifference, difference
from ep_export.entropy import approximation_spread, series_scores, token_scores
from ep_export.policy import Chooser, TopK
from ep_export.reference import CutTrace

__all__ = ["difference_from_exact"]


def difference_from_exact(
    trace: CutTrace, kept_index: np.ndarray, chooser: Chooser, degree: int
) -> KeptDifference:
    """Compare what goes on after a cut, prompt positions, with the exact choice of what arrived there.

    Near-ties are what float32 scores of the same formula, or the series itself, may swap.
    """
    arrived = trace.arrived.numpy()
    local = np.flatnonzero(np.isin(arrived, kept_index))
    local = local[np.isin(local, trace.tokens.visual_index.numpy())]
    tolerance = EXACT_TOLERANCE
    if isinstance(chooser, TopK):
        states = trace.tokens.states
        exact, series = token_scores(states, chooser.scorer), series_scores(states, chooser.scorer, degree)
        tolerance += approximation_spread(exact, series)
    return difference(chooser, trace.tokens, torch.from_numpy(local), len(local), tolerance=tolerance)

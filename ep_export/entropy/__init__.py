"""Entropy of visual tokens and of layers: exact scores, their eigenvalue-free form, selection, collapse."""

from __future__ import annotations

from ep_export.entropy.collapse import Collapse, find_collapse, fixed_rule_stages
from ep_export.entropy.layer_entropy import layer_entropy, layer_spectrum
from ep_export.entropy.scores import token_scores
from ep_export.entropy.selection import EXACT_TOLERANCE, KeptDifference, kept_difference, select_tokens
from ep_export.entropy.series import EntropySeries, approximation_spread, entropy_series, series_scores

__all__ = [
    "EXACT_TOLERANCE",
    "Collapse",
    "EntropySeries",
    "KeptDifference",
    "approximation_spread",
    "entropy_series",
    "find_collapse",
    "fixed_rule_stages",
    "kept_difference",
    "layer_entropy",
    "layer_spectrum",
    "select_tokens",
    "series_scores",
    "token_scores",
]

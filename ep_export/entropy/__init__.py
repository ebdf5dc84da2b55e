"""Entropy of visual tokens and of layers: exact scores, their Chebyshev form, selection, collapse."""

from __future__ import annotations

from ep_export.entropy.chebyshev import (
    TracePlan,
    approximation_spread,
    chebyshev_coefficients,
    chebyshev_scores,
    trace_plan,
)
from ep_export.entropy.collapse import Collapse, find_collapse, fixed_rule_stages
from ep_export.entropy.layer_entropy import layer_entropy, layer_spectrum
from ep_export.entropy.scores import token_scores
from ep_export.entropy.selection import EXACT_TOLERANCE, KeptDifference, kept_difference, select_tokens

__all__ = [
    "EXACT_TOLERANCE",
    "Collapse",
    "KeptDifference",
    "TracePlan",
    "approximation_spread",
    "chebyshev_coefficients",
    "chebyshev_scores",
    "find_collapse",
    "fixed_rule_stages",
    "kept_difference",
    "layer_entropy",
    "layer_spectrum",
    "select_tokens",
    "token_scores",
    "trace_plan",
]

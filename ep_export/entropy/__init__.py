"""Entropy of visual tokens and of layers: exact scores, their eigenvalue-free form, metrics, collapse."""

from __future__ import annotations

from ep_export.entropy.collapse import Collapse, find_collapse, fixed_rule_stages
from ep_export.entropy.layer_entropy import layer_entropy, layer_spectrum
from ep_export.entropy.metrics import METRICS, VENDI, LayerMetric, LayerTokens
from ep_export.entropy.scores import token_scores
from ep_export.entropy.series import EntropySeries, approximation_spread, entropy_series, series_scores
from ep_export.entropy.spectra import spectrum_entropy

__all__ = [
    "METRICS",
    "VENDI",
    "Collapse",
    "EntropySeries",
    "LayerMetric",
    "LayerTokens",
    "approximation_spread",
    "entropy_series",
    "find_collapse",
    "fixed_rule_stages",
    "layer_entropy",
    "layer_spectrum",
    "series_scores",
    "spectrum_entropy",
    "token_scores",
]

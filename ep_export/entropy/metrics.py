"""The metrics that a calibration draws beside the entropies of queries and keys, one number a layer each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.entropy.layer_entropy import layer_spectrum
from ep_export.entropy.nuclear_norm import matrix_nuclear_norm
from ep_export.entropy.schur import schur_entropy
from ep_export.entropy.truncated import truncated_entropy
from ep_export.entropy.vendi import vendi_score

if TYPE_CHECKING:
    import torch

__all__ = ["METRICS", "VENDI", "LayerMetric", "LayerTokens"]


@dataclass(frozen=True)
class LayerTokens:
    """What one layer holds of a prompt, in any float type.

    Attributes:
        queries: [N, heads * head_dim] of the visual tokens, before rotary embedding.
        visual: [N, d] hidden states of the visual tokens that enter the layer.
        text: [T, d] those of the other tokens.
    """

    queries: torch.Tensor
    visual: torch.Tensor
    text: torch.Tensor

    @functools.cached_property
    def query_spectrum(self) -> torch.Tensor:
        """See `layer_spectrum`."""
        return layer_spectrum(self.queries)


@dataclass(frozen=True)
class LayerMetric:
    """One number a layer.

    Attributes:
        key: Its name in records.
        title: Its name for people.
        unit: Of the number; empty where it has none.
        source: Citation.
        compute: From what a layer holds.
    """

    key: str
    title: str
    unit: str
    source: str
    compute: Callable[[LayerTokens], float]


VENDI = LayerMetric(
    "vendi",
    "Vendi score",
    "tokens",
    "arXiv 2210.02410",
    lambda tokens: vendi_score(tokens.visual),
)
"""How many different tokens the visual tokens are worth."""

METRICS = (
    LayerMetric(
        "truncated",
        "truncated entropy of the queries",
        "nats",
        "UNComp, arXiv 2410.03090",
        lambda tokens: truncated_entropy(tokens.query_spectrum),
    ),
    VENDI,
    LayerMetric(
        "nuclear",
        "Matrix Nuclear-Norm",
        "",
        "arXiv 2410.10672",
        lambda tokens: matrix_nuclear_norm(tokens.visual),
    ),
    LayerMetric(
        "schur",
        "Schur complement entropy: beyond the question",
        "nats",
        "after arXiv 2412.18645",
        lambda tokens: schur_entropy(tokens.visual, tokens.text),
    ),
)
"""All that are measured; a fifth is one file and one entry here."""

"""Importance and distance together: keep important tokens that are far from what is kept already.

The best published ways of choosing tokens join both. SCOPE (Deng et al., NeurIPS 2025, arXiv 2510.24214)
multiplies a token's saliency by what it newly covers of all tokens, and takes the token of highest product in
turn; TOPS (Wang et al., arXiv 2606.27161) asks of a set that it is relevant, covers and is diverse. What a
token newly covers of all others takes a matrix of N x N similarities at every step. Here it covers itself:
the product is

    importance x cosine distance to the nearest kept token,

which takes one row of distances a step and falls the same way where a neighbour is kept. SCOPE as published
is `ep_export.methods.scope`.

Importance is a score of `ep_export.entropy.scores` scaled over the tokens that arrive,

    (score - lowest + e) / (highest - lowest + e),

with the score's sign changed where the lowest are important. e is 1/1000: of a nat, and of the largest
absolute score where the score is no entropy. It keeps the least important token above zero, and makes all
tokens equal where their scores differ by rounding alone. The first token is the most important.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ep_export.choosers.base import Choice, ChooserForm, CutTokens, KeptDifference, PruneInputs
from ep_export.choosers.greedy import (
    NOT_FINITE,
    UnitRows,
    greedy_body,
    greedy_difference,
    greedy_order,
    unit_rows_body,
)
from ep_export.entropy.scores import token_scores
from ep_export.policy import Coverage, Scorer, Select

if TYPE_CHECKING:
    import onnx_ir as ir

    from ep_export.graph import Nodes

__all__ = ["CoverageForm", "importance", "weighted_rows"]

_EVEN = 1e-3
"""e; see the module."""

_IN_NATS = frozenset({Scorer.PAPER, Scorer.ORDER2})

_TINY = 1e-30
"""Keeps the division finite where all scores are zero."""

_LARGEST = 3.4e38
"""Beyond every finite score in float32."""

_DIGITS = 12
"""As distances are rounded: equal tokens are equally important."""


class CoverageForm(ChooserForm[Coverage]):
    """Scores of `ep_export.entropy`, distances of the hidden states."""

    def choose(self, chooser: Coverage, tokens: CutTokens, k: int) -> Choice:
        """Importance and distances in float64.

        Raises:
            ValueError: There are no states, or k is not 1 to N.
        """
        rows, first = weighted_rows(chooser, tokens)
        order, scores = greedy_order(rows, first, k)
        return Choice(tokens.visual_index[order.sort().values], scores)

    def difference(
        self, chooser: Coverage, tokens: CutTokens, kept: torch.Tensor, k: int, *, tolerance: float
    ) -> KeptDifference:
        """See `greedy_difference`; the tolerance is in importance times distance."""
        rows, first = weighted_rows(chooser, tokens)
        return greedy_difference(rows, first, tokens, kept, k, tolerance)

    def body(self, nodes: Nodes, chooser: Coverage, inputs: PruneInputs) -> tuple[ir.Value, ir.Value]:
        """Scores without eigenvalues, then one Loop over the tokens that stay."""
        from ep_export.entropy.scores_body import append_scores

        states = nodes.op("Gather", inputs.scored(), inputs.visual_index, axis=1)
        states = nodes.op("Squeeze", states, nodes.ints(0))
        scores = append_scores(nodes, states, chooser.scorer, inputs.heads, inputs.degree)
        scores = nodes.op("Unsqueeze", scores, nodes.ints(0))
        rows, finite = unit_rows_body(nodes, inputs)
        # false for NaN and infinity
        scored = nodes.op("Less", nodes.op("Abs", scores), nodes.number(_LARGEST))
        finite = nodes.op("And", finite, scored)
        rows = nodes.op("Where", nodes.op("Transpose", finite, perm=[1, 0]), rows, nodes.number(0.0))
        weights = _importance_body(nodes, scores, finite, chooser)
        numbers = nodes.op("Unsqueeze", nodes.indices(nodes.length(inputs.visual_index)), nodes.ints(0))
        first = nodes.op("Where", finite, weights, nodes.number(NOT_FINITE))
        start = nodes.op("ArgMax", first, axis=1, keepdims=1)
        return greedy_body(nodes, inputs, rows, finite, numbers, start, weights=weights)


def importance(scores: torch.Tensor, chooser: Coverage) -> torch.Tensor:
    """Scores scaled to 0..1 over the tokens; see the module.

    Args:
        scores: [N] float64.
        chooser: Which score it is, and which end is important.

    Returns:
        [N] float64, 1 for the most important token, 0 where a score is not finite.
    """
    finite = torch.isfinite(scores)
    if not finite.any():
        return torch.zeros_like(scores)
    directed = scores if chooser.select is Select.HIGHEST else -scores
    low, high = directed[finite].min(), directed[finite].max()
    unit = 1.0 if chooser.scorer in _IN_NATS else float(directed[finite].abs().max()) + _TINY
    even = _EVEN * unit
    scaled = ((directed - low + even) / (high - low + even)).round(decimals=_DIGITS)
    return torch.where(finite, scaled, 0.0)


def weighted_rows(chooser: Coverage, tokens: CutTokens) -> tuple[UnitRows, torch.Tensor]:
    """The tokens with their importance as weights, and what the first is taken by."""
    if tokens.states is None:
        raise ValueError(f"{chooser.name} scores states, and there are none")
    rows = UnitRows.of(tokens.hidden)
    scores = token_scores(tokens.states, chooser.scorer)
    finite = rows.finite & torch.isfinite(scores)
    weights = importance(torch.where(finite, scores, torch.nan), chooser)
    rows = replace(rows, rows=torch.where(finite[:, None], rows.rows, 0.0), finite=finite, weights=weights)
    return rows, torch.where(finite, weights, NOT_FINITE)


def _importance_body(nodes: Nodes, scores: ir.Value, finite: ir.Value, chooser: Coverage) -> ir.Value:
    """`importance` of [1, N] scores; what stands where a token is not finite is of no account."""
    directed = scores if chooser.select is Select.HIGHEST else nodes.op("Neg", scores)
    axis, largest = nodes.ints(1), nodes.number(_LARGEST)
    low = nodes.op("ReduceMin", nodes.op("Where", finite, directed, largest), axis)
    high = nodes.op("ReduceMax", nodes.op("Where", finite, directed, nodes.op("Neg", largest)), axis)
    directed = nodes.op("Where", finite, directed, low)
    even = nodes.number(_EVEN)
    if chooser.scorer not in _IN_NATS:
        unit = nodes.op("Max", nodes.op("Abs", low), nodes.op("Abs", high))
        even = nodes.op("Mul", nodes.op("Add", unit, nodes.number(_TINY)), even)
    span = nodes.op("Add", nodes.op("Sub", high, low), even)
    return nodes.op("Div", nodes.op("Add", nodes.op("Sub", directed, low), even), span)

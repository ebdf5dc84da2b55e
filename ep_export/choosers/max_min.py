"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): keep tokens that are far from each other.

The max-min diversity problem, solved greedily (`ep_export.choosers.greedy`). The first token is the one whose
nearest neighbour is farthest, found a block of rows at a time; every further one is the token whose nearest
kept token is farthest.
"""
# ruff: noqa: ARG002 - a form need not look at everything it is given

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.choosers.base import Choice, ChooserForm, CutTokens, KeptDifference, PruneInputs
from ep_export.choosers.greedy import (
    BLOCK,
    UnitRows,
    greedy_body,
    greedy_difference,
    greedy_order,
    unit_rows_body,
)
from ep_export.policy import MaxMin

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from ep_export.graph import Nodes

__all__ = ["MaxMinForm", "farthest_first"]


class MaxMinForm(ChooserForm[MaxMin]):
    """On the hidden states."""

    def choose(self, chooser: MaxMin, tokens: CutTokens, k: int) -> Choice:
        """See `farthest_first`.

        Raises:
            ValueError: k is not 1 to N.
        """
        order, scores = farthest_first(tokens.hidden, k)
        return Choice(tokens.visual_index[order.sort().values], scores)

    def difference(
        self, chooser: MaxMin, tokens: CutTokens, kept: torch.Tensor, k: int, *, tolerance: float
    ) -> KeptDifference:
        """See `greedy_difference`; the tolerance is in cosine distance."""
        rows = UnitRows.of(tokens.hidden)
        return greedy_difference(rows, rows.loneliness(), tokens, kept, k, tolerance)

    def body(self, nodes: Nodes, chooser: MaxMin, inputs: PruneInputs) -> tuple[ir.Value, ir.Value]:
        """Two Loops: one over blocks of rows for the start, one over the tokens that stay."""
        rows, finite = unit_rows_body(nodes, inputs)
        numbers = nodes.op("Unsqueeze", nodes.indices(nodes.length(inputs.visual_index)), nodes.ints(0))
        start = _start_body(nodes, rows, finite, numbers)
        return greedy_body(nodes, inputs, rows, finite, numbers, start)


def farthest_first(hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first so many tokens, and what every token's choice rests on: see `greedy_order`.

    Args:
        hidden: [N, d], any float type, any device.
        count: 1 to N.

    Raises:
        ValueError: Impossible count.
    """
    rows = UnitRows.of(hidden)
    return greedy_order(rows, rows.loneliness(), count)


def _start_body(nodes: Nodes, rows: ir.Value, finite: ir.Value, numbers: ir.Value) -> ir.Value:
    """Number of the token whose nearest neighbour is farthest: [1, 1]. Cosines lie between -1 and 1."""
    last = nodes.op("Sub", nodes.length(rows), nodes.ints(1))
    block = nodes.whole(BLOCK)
    trips = nodes.op("Div", nodes.op("Add", nodes.op("Squeeze", last), block), block)
    places = nodes.number(np.arange(BLOCK), np.int64)

    def step(inner: Nodes, values: Sequence[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        iteration, best, best_number = values
        # the last block repeats the last row: every block has one shape
        here = inner.op("Min", inner.op("Add", places, inner.op("Mul", iteration, block)), last)  # [B]
        cosines = inner.op("Gemm", inner.op("Gather", rows, here, axis=0), rows, transB=1)  # [B, N]
        itself = inner.op("Equal", inner.op("Unsqueeze", here, inner.ints(1)), numbers)
        neighbours = inner.op("And", finite, inner.op("Not", itself))
        cosines = inner.op("Where", neighbours, cosines, inner.number(-2.0))
        nearest = inner.op("Transpose", inner.op("ReduceMax", cosines, inner.ints(1)), perm=[1, 0])
        nearest = inner.op("Where", inner.op("Gather", finite, here, axis=1), nearest, inner.number(2.0))
        lowest = inner.op("ReduceMin", nearest, inner.ints(1))  # [1, 1]
        place = inner.op("Squeeze", inner.op("ArgMin", nearest, axis=1), inner.ints(0))
        number = inner.op("Unsqueeze", inner.op("Gather", here, place, axis=0), inner.ints(0))
        better = inner.op("Less", lowest, best)
        return [
            inner.op("Where", better, new, old) for new, old in ((lowest, best), (number, best_number))
        ], []

    return nodes.loop(trips, [nodes.number([[3.0]]), nodes.number([[0]], np.int64)], step)[1]

"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): keep tokens that are far from each other.

The max-min diversity problem, solved greedily. Distance is 1 - cosine; a zero row has cosine 0 to all. The
first token is the one whose nearest neighbour is farthest; every further one is the token whose nearest kept
token is farthest. Ties go to the lower index. Tokens that are not finite are nobody's neighbour and are
chosen after all others, the lower index first.

No form holds an N x N matrix: the start is found a block of rows at a time, every further step costs one row
of distances.
"""
# ruff: noqa: ARG002 - a form need not look at everything it is given

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.choosers.base import Choice, ChooserForm, CutTokens, KeptDifference, PruneInputs
from ep_export.policy import MaxMin

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from ep_export.graph import Nodes

__all__ = ["FIRST_SCORE", "MaxMinForm", "farthest_first", "near_tie_order"]

FIRST_SCORE = 2.0
"""Score of the first token: the largest cosine distance there is."""

_NOT_FINITE = -1.0
"""Score of a token that is not finite: below every distance."""

_CHOSEN = -2.0
"""Below `_NOT_FINITE`: never chosen again."""

_DIGITS = 12
"""Distances are rounded to so many decimals: equal tokens tie whatever the order of a sum in float64."""

_TURNS = 64
"""Of `near_tie_order`: each holds N distances."""

_BLOCK = 256
"""Rows of the start at a time: 16 MB in float32 at N = 16,384."""


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
        """Equal to the exact set, a near-tie when `near_tie_order` finds an order for it, else different."""
        index = tokens.visual_index
        inside = torch.isin(index, kept.to(index.device))
        # another number, a position twice, or one that is no visual token
        if not int(inside.sum()) == len(kept) == k:
            return KeptDifference.DIFFERENT
        if torch.equal(index[inside], self.choose(chooser, tokens, k).kept):
            return KeptDifference.EQUAL
        explained = near_tie_order(tokens.hidden, inside, tolerance)
        return KeptDifference.NEAR_TIE if explained else KeptDifference.DIFFERENT

    def body(self, nodes: Nodes, chooser: MaxMin, inputs: PruneInputs) -> tuple[ir.Value, ir.Value]:
        """Two Loops: one over blocks of rows for the start, one over the tokens that stay."""
        rows, finite = _unit_rows_body(nodes, inputs)
        numbers = nodes.op("Unsqueeze", nodes.indices(nodes.length(inputs.visual_index)), nodes.ints(0))
        start = _start_body(nodes, rows, finite, numbers)
        nearest = nodes.op("Where", finite, nodes.number(2 * FIRST_SCORE), nodes.number(_NOT_FINITE))
        is_start = nodes.op("Equal", numbers, start)
        nearest = nodes.op("Where", is_start, nodes.number(3 * FIRST_SCORE), nearest)

        def step(inner: Nodes, values: Sequence[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
            _, nearest = values
            # ArgMax over two dimensions: TensorRT-RTX refuses it over one
            chosen = inner.op("ArgMax", nearest, axis=1, keepdims=1)
            score = inner.op("ReduceMax", nearest, inner.ints(1), keepdims=0)
            number = inner.op("Squeeze", chosen, inner.ints(0))
            row = inner.op("Gather", rows, number, axis=0)
            distance = inner.op("Sub", inner.number(1.0), inner.op("Gemm", row, rows, transB=1))
            nearer = inner.op("Min", nearest, distance)
            nearer = inner.op("Where", inner.op("Equal", numbers, chosen), inner.number(_CHOSEN), nearer)
            return [nearer], [number, score]

        trips = nodes.op("Squeeze", inputs.count(nodes))
        nearest, order, scores = nodes.loop(trips, [nearest], step)
        order = nodes.op("Transpose", order, perm=[1, 0])
        scores = nodes.op("Min", nodes.op("Transpose", scores, perm=[1, 0]), nodes.number(FIRST_SCORE))
        scores = nodes.op("ScatterElements", nearest, order, scores, axis=1)
        kept = nodes.op("Gather", inputs.visual_index, nodes.op("Squeeze", order, nodes.ints(0)), axis=0)
        return kept, nodes.op("Squeeze", scores, nodes.ints(0))


def farthest_first(hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first so many tokens, and what every token's choice rests on.

    Args:
        hidden: [N, d], any float type, any device.
        count: 1 to N. A smaller count gives the beginning of a larger one's order.

    Returns:
        Token numbers [count] int64 in the order they are chosen, and scores [N] float64: of a chosen token
        the distance to the nearest one chosen before it (`FIRST_SCORE` for the first), of another the
        distance to the nearest chosen one; -1 for a token that is not finite. So the best scores are the
        tokens of any smaller count.

    Raises:
        ValueError: Impossible count.
    """
    if not 1 <= count <= len(hidden):
        raise ValueError(f"cannot keep {count} of {len(hidden)} tokens")
    rows = _UnitRows.of(hidden)
    chosen = int(rows.loneliness().argmax())
    nearest = rows.unreached()
    scores, order = nearest.clone(), [chosen]
    scores[chosen] = FIRST_SCORE
    nearest = rows.nearest_after(nearest, chosen)
    while len(order) < count:
        chosen = int(nearest.argmax())
        scores[chosen] = nearest[chosen]
        order.append(chosen)
        nearest = rows.nearest_after(nearest, chosen)
    return torch.tensor(order, device=hidden.device), torch.where(nearest == _CHOSEN, scores, nearest)


def near_tie_order(hidden: torch.Tensor, inside: torch.Tensor, tolerance: float) -> bool:
    """Whether a farthest-first choice that errs by less than the tolerance can end in a given set.

    It can when the set has an order in which every token, at its turn, is at most `tolerance` nearer to the
    tokens before it than the farthest of all N tokens is, and the first one's nearest neighbour at most
    `tolerance` nearer than that of the loneliest token.

    Orders are tried depth first, the farthest token of the set first; a token is taken back only where
    another of the set was a near-tie as well. Narrower tolerances are tried before the full one: most errors
    are far below it, and few near-ties leave few orders. A search ends without an order after 4 k + 256
    turns, and goes back over the last 64 turns that had a choice.

    Args:
        hidden: [N, d].
        inside: [N] bool, the set, of at least one token.
        tolerance: In cosine distance.
    """
    rows = _UnitRows.of(hidden)
    loneliness = rows.loneliness()
    return any(_order(rows, loneliness, inside, tolerance / part) for part in (64, 16, 4, 1))


def _order(rows: _UnitRows, loneliness: torch.Tensor, inside: torch.Tensor, tolerance: float) -> bool:
    """One search of `near_tie_order`."""
    turns: deque[tuple[torch.Tensor, list[int]]] = deque(maxlen=_TURNS)
    nearest, candidates, distance = rows.unreached(), inside, loneliness
    for _ in range(4 * int(inside.sum()) + 256):
        tied = (candidates & (distance >= distance.max() - tolerance)).nonzero().flatten()
        if len(tied):
            turns.append((nearest, tied[distance[tied].argsort(stable=True)].tolist()))
        if not turns:
            return False
        nearest, choices = turns[-1]
        chosen = choices.pop()
        if not choices:
            turns.pop()
        distance = nearest = rows.nearest_after(nearest, chosen)
        candidates = inside & (nearest != _CHOSEN)
        if not candidates.any():
            return True
    return False


@dataclass(frozen=True)
class _UnitRows:
    """Rows of length 1.

    Attributes:
        rows: [N, d] float64; zero rows and rows that are not finite are zero.
        finite: [N] bool.
    """

    rows: torch.Tensor
    finite: torch.Tensor

    @classmethod
    def of(cls, hidden: torch.Tensor) -> _UnitRows:
        exact = hidden.detach().to(torch.float64)
        finite = torch.isfinite(exact).all(dim=1)
        exact = torch.where(finite[:, None], exact, 0.0)
        norms = exact.norm(dim=1, keepdim=True)
        return cls(exact / torch.where(norms > 0, norms, 1.0), finite)

    def loneliness(self) -> torch.Tensor:
        """Distance of every token to its nearest neighbour: [N]; infinite for one that has none."""
        blocks = []
        for start in range(0, len(self.rows), _BLOCK):
            distance = (1.0 - self.rows[start : start + _BLOCK] @ self.rows.T).round(decimals=_DIGITS)
            distance[:, ~self.finite] = torch.inf
            distance.diagonal(start).fill_(torch.inf)
            blocks.append(distance.min(dim=1).values)
        return torch.where(self.finite, torch.cat(blocks), _NOT_FINITE)

    def unreached(self) -> torch.Tensor:
        """What `nearest_after` starts from: [N], above every distance."""
        return torch.where(self.finite, 2 * FIRST_SCORE, _NOT_FINITE).to(torch.float64)

    def nearest_after(self, nearest: torch.Tensor, chosen: int) -> torch.Tensor:
        """Distance of every token to its nearest chosen one, when one more is chosen."""
        distance = (1.0 - self.rows @ self.rows[chosen]).round(decimals=_DIGITS)
        nearest = torch.minimum(nearest, distance)
        nearest[chosen] = _CHOSEN
        return nearest


def _unit_rows_body(nodes: Nodes, inputs: PruneInputs) -> tuple[ir.Value, ir.Value]:
    """Visual rows of length 1 [N, d] float32, zero where they are zero or not finite; and finite [1, N]."""
    zero, one = nodes.number(0.0), nodes.number(1.0)
    visual = nodes.op("Gather", inputs.hidden, inputs.visual_index, axis=1)
    visual = nodes.to_float(nodes.op("Squeeze", visual, nodes.ints(0)))
    # squares of very large or small states leave float32: every row is scaled to a maximum of 1 first
    largest = nodes.op("ReduceMax", nodes.op("Abs", visual), nodes.ints(1), keepdims=1)
    largest = nodes.op("Where", nodes.op("Equal", largest, zero), one, largest)
    visual = nodes.op("Div", visual, largest)
    squares = nodes.op("ReduceSum", nodes.op("Mul", visual, visual), nodes.ints(1), keepdims=1)
    finite = nodes.op("GreaterOrEqual", squares, zero)  # a NaN is not, and infinity / infinity is one
    norms = nodes.op("Sqrt", nodes.op("Where", nodes.op("Greater", squares, zero), squares, one))
    rows = nodes.op("Where", finite, nodes.op("Div", visual, norms), zero)
    return rows, nodes.op("Transpose", finite, perm=[1, 0])


def _start_body(nodes: Nodes, rows: ir.Value, finite: ir.Value, numbers: ir.Value) -> ir.Value:
    """Number of the token whose nearest neighbour is farthest: [1, 1]. Cosines lie between -1 and 1."""
    last = nodes.op("Sub", nodes.length(rows), nodes.ints(1))
    block = nodes.whole(_BLOCK)
    trips = nodes.op("Div", nodes.op("Add", nodes.op("Squeeze", last), block), block)
    places = nodes.number(np.arange(_BLOCK), np.int64)

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

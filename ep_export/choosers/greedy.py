"""Tokens chosen one after the other by their distance to those chosen before: what set choosers share.

Distance is 1 - cosine; a zero row has cosine 0 to all. At every step the token of highest priority is taken,
ties to the lower index, and every other token's priority becomes at most its weight times its distance to
the one just taken. So priorities only fall, and a smaller choice is the beginning of a larger one. Tokens
that are not finite are nobody's neighbour and are taken after all others, the lower index first.

No form holds an N x N matrix: a step costs one row of distances.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ep_export.choosers.base import KeptDifference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from ep_export.choosers.base import CutTokens, PruneInputs
    from ep_export.graph import Nodes

__all__ = [
    "FIRST_SCORE",
    "NOT_FINITE",
    "UnitRows",
    "greedy_body",
    "greedy_difference",
    "greedy_order",
    "near_tie_order",
    "unit_rows_body",
]

FIRST_SCORE = 2.0
"""Score of the first token: the largest cosine distance there is."""

NOT_FINITE = -1.0
"""Priority of a token that is not finite: below every distance."""

_CHOSEN = -2.0
"""Below `NOT_FINITE`: never chosen again."""

_DIGITS = 12
"""Distances are rounded to so many decimals: equal tokens tie whatever the order of a sum in float64."""

_TURNS = 64
"""Of `near_tie_order`: each holds N priorities."""

BLOCK = 256
"""Rows of a block of distances: 16 MB in float32 at N = 16,384."""


@dataclass(frozen=True)
class UnitRows:
    """Rows of length 1.

    Attributes:
        rows: [N, d] float64; zero rows and rows that are not finite are zero.
        finite: [N] bool: which tokens count.
        weights: [N] float64, 0 to 1: what a token's distance is multiplied by; None for 1.
    """

    rows: torch.Tensor
    finite: torch.Tensor
    weights: torch.Tensor | None = None

    @classmethod
    def of(cls, hidden: torch.Tensor) -> UnitRows:
        """Of any float type [N, d], on its device."""
        exact = hidden.detach().to(torch.float64)
        finite = torch.isfinite(exact).all(dim=1)
        exact = torch.where(finite[:, None], exact, 0.0)
        norms = exact.norm(dim=1, keepdim=True)
        return cls(exact / torch.where(norms > 0, norms, 1.0), finite)

    def loneliness(self) -> torch.Tensor:
        """Distance of every token to its nearest neighbour: [N]; infinite for one that has none."""
        blocks = []
        for start in range(0, len(self.rows), BLOCK):
            distance = (1.0 - self.rows[start : start + BLOCK] @ self.rows.T).round(decimals=_DIGITS)
            distance[:, ~self.finite] = torch.inf
            distance.diagonal(start).fill_(torch.inf)
            blocks.append(distance.min(dim=1).values)
        return torch.where(self.finite, torch.cat(blocks), NOT_FINITE)

    def unreached(self) -> torch.Tensor:
        """What `after` starts from: [N], above every distance."""
        return torch.where(self.finite, 2 * FIRST_SCORE, NOT_FINITE).to(torch.float64)

    def after(self, priority: torch.Tensor, chosen: int) -> torch.Tensor:
        """Priorities when one more token is chosen."""
        distance = (1.0 - self.rows @ self.rows[chosen]).round(decimals=_DIGITS)
        if self.weights is not None:
            distance = self.weights * distance
        priority = torch.minimum(priority, distance)
        priority[chosen] = _CHOSEN
        return priority


def greedy_order(rows: UnitRows, first: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first so many tokens, and what every token's choice rests on.

    Args:
        rows: The tokens.
        first: [N] float64 priorities that the first token is taken by.
        count: 1 to N. A smaller count gives the beginning of a larger one's order.

    Returns:
        Token numbers [count] int64 in the order they are chosen, and scores [N] float64: of a chosen token
        its priority when it was chosen (`FIRST_SCORE` for the first), of another its priority in the end; -1
        for a token that is not finite. So the best scores are the tokens of any smaller count.

    Raises:
        ValueError: Impossible count.
    """
    if not 1 <= count <= len(first):
        raise ValueError(f"cannot keep {count} of {len(first)} tokens")
    chosen = int(first.argmax())
    priority = rows.unreached()
    scores, order = priority.clone(), [chosen]
    scores[chosen] = FIRST_SCORE
    priority = rows.after(priority, chosen)
    while len(order) < count:
        chosen = int(priority.argmax())
        scores[chosen] = priority[chosen]
        order.append(chosen)
        priority = rows.after(priority, chosen)
    return torch.tensor(order, device=first.device), torch.where(priority == _CHOSEN, scores, priority)


def greedy_difference(
    rows: UnitRows,
    first: torch.Tensor,
    tokens: CutTokens,
    kept: torch.Tensor,
    k: int,
    tolerance: float,
) -> KeptDifference:
    """Equal to the exact set, a near-tie when `near_tie_order` finds an order for it, else different.

    Args:
        rows: The tokens.
        first: See `greedy_order`.
        tokens: The same tokens, for their positions.
        kept: [k] positions another runtime kept.
        k: How many stay.
        tolerance: See `near_tie_order`.
    """
    index = tokens.visual_index
    inside = torch.isin(index, kept.to(index.device))
    # another number, a position twice, or one that is no visual token
    if not int(inside.sum()) == len(kept) == k:
        return KeptDifference.DIFFERENT
    exact, _ = greedy_order(rows, first, k)
    if torch.equal(inside.nonzero().flatten(), exact.sort().values):
        return KeptDifference.EQUAL
    explained = near_tie_order(rows, first, inside, tolerance)
    return KeptDifference.NEAR_TIE if explained else KeptDifference.DIFFERENT


def near_tie_order(rows: UnitRows, first: torch.Tensor, inside: torch.Tensor, tolerance: float) -> bool:
    """Whether a greedy choice that errs by less than the tolerance can end in a given set.

    It can when the set has an order in which every token's priority, at its turn, is at most `tolerance`
    below the highest of all N tokens.

    Orders are tried depth first, the token of highest priority first; a token is taken back only where
    another of the set was a near-tie as well. Narrower tolerances are tried before the full one: most errors
    are far below it, and few near-ties leave few orders. A search ends without an order after 4 k + 256
    turns, and goes back over the last 64 turns that had a choice.

    Args:
        rows: The tokens.
        first: [N] see `greedy_order`.
        inside: [N] bool, the set, of at least one token.
        tolerance: In the unit of the priorities.
    """
    return any(_order(rows, first, inside, tolerance / part) for part in (64, 16, 4, 1))


def _order(rows: UnitRows, first: torch.Tensor, inside: torch.Tensor, tolerance: float) -> bool:
    """One search of `near_tie_order`."""
    turns: deque[tuple[torch.Tensor, list[int]]] = deque(maxlen=_TURNS)
    reached, candidates, priority = rows.unreached(), inside, first
    for _ in range(4 * int(inside.sum()) + 256):
        tied = (candidates & (priority >= priority.max() - tolerance)).nonzero().flatten()
        if len(tied):
            turns.append((reached, tied[priority[tied].argsort(stable=True)].tolist()))
        if not turns:
            return False
        reached, choices = turns[-1]
        chosen = choices.pop()
        if not choices:
            turns.pop()
        priority = reached = rows.after(reached, chosen)
        candidates = inside & (reached != _CHOSEN)
        if not candidates.any():
            return True
    return False


def unit_rows_body(nodes: Nodes, inputs: PruneInputs) -> tuple[ir.Value, ir.Value]:
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


def greedy_body(
    nodes: Nodes,
    inputs: PruneInputs,
    rows: ir.Value,
    finite: ir.Value,
    numbers: ir.Value,
    start: ir.Value,
    *,
    weights: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value]:
    """Append a Loop over the tokens that stay.

    Args:
        nodes: Where to.
        inputs: Of the graph.
        rows: [N, d] float32, from `unit_rows_body`.
        finite: [1, N] bool: which tokens count.
        numbers: [1, N] int64: 0, 1, .., N - 1.
        start: [1, 1] int64, number of the first token.
        weights: [1, N] float32; None for 1.

    Returns:
        [k] int64 positions that stay, and [N] float32 scores; see `greedy_order`.
    """
    priority = nodes.op("Where", finite, nodes.number(2 * FIRST_SCORE), nodes.number(NOT_FINITE))
    is_start = nodes.op("Equal", numbers, start)
    priority = nodes.op("Where", is_start, nodes.number(3 * FIRST_SCORE), priority)

    def step(inner: Nodes, values: Sequence[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        _, priority = values
        # ArgMax over two dimensions: TensorRT-RTX refuses it over one
        chosen = inner.op("ArgMax", priority, axis=1, keepdims=1)
        score = inner.op("ReduceMax", priority, inner.ints(1), keepdims=0)
        number = inner.op("Squeeze", chosen, inner.ints(0))
        row = inner.op("Gather", rows, number, axis=0)
        distance = inner.op("Sub", inner.number(1.0), inner.op("Gemm", row, rows, transB=1))
        if weights is not None:
            distance = inner.op("Mul", distance, weights)
        after = inner.op("Min", priority, distance)
        after = inner.op("Where", inner.op("Equal", numbers, chosen), inner.number(_CHOSEN), after)
        return [after], [number, score]

    trips = nodes.op("Squeeze", inputs.count(nodes))
    priority, order, scores = nodes.loop(trips, [priority], step)
    order = nodes.op("Transpose", order, perm=[1, 0])
    scores = nodes.op("Min", nodes.op("Transpose", scores, perm=[1, 0]), nodes.number(FIRST_SCORE))
    scores = nodes.op("ScatterElements", priority, order, scores, axis=1)
    kept = nodes.op("Gather", inputs.visual_index, nodes.op("Squeeze", order, nodes.ints(0)), axis=0)
    return kept, nodes.op("Squeeze", scores, nodes.ints(0))

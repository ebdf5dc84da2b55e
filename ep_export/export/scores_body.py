"""The token scores in standard ONNX operators: no eigendecomposition.

`-tr(A ln A)` is the trace of a function of A. With s = ||A||_F the spectrum of A/s lies in [0, 1], where a
sum over repeated squares stands in for `-x ln x` (`ep_export.entropy.entropy_series`). Exact scores:
`ep_export.entropy`; this is the ONNX form of its `series_scores`.
Everything is float32, whatever the type of the states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ep_export.entropy import EntropySeries, entropy_series
from ep_export.policy import Scorer

__all__ = ["Body", "append_scores"]

# Below every value of interest and far above float32's smallest normal number (1.2e-38), so that 1/x and ln x
# stay finite for zero matrices, whose factor is 0 anyway.
_TINY = 1e-30
# The same for a norm that comes from squares, which are 0 below 1e-38.
_TINY_NORM = 1e-18


class Body:
    """Nodes of a function or graph under construction, constants as nodes: functions have no initializers."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append a node of the default domain with one output."""
        return self.ops(op_type, inputs, 1, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[ir.Value], outputs: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        node.name = f"{op_type}_{len(self.nodes)}"
        for i, value in enumerate(node.outputs):
            value.name = f"{op_type.lower()}_{len(self.nodes)}" + (f"_{i}" if i else "")
        self.nodes.append(node)
        return node.outputs

    def number(self, value: Any, dtype: Any = np.float32) -> ir.Value:
        """A constant; numbers and lists."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=ir.tensor(array))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A vector of int64."""
        return self.number(list(values), np.int64)


def append_scores(body: Body, states: ir.Value, scorer: Scorer, heads: int, degree: int) -> ir.Value:
    """Append the nodes of a scorer.

    Args:
        body: Where to.
        states: [N, heads, D], any float type.
        scorer: Which score.
        heads: H.
        degree: Degree of the series, one of `policy.DEGREES` (entropies only).

    Returns:
        [N] float32; NaN or infinite where the states are.
    """
    x = body.op("Cast", states, to=int(ir.DataType.FLOAT))
    if scorer is Scorer.NORM:
        squares = body.op("ReduceSum", body.op("Mul", x, x), body.ints(1, 2), keepdims=0)
        return body.op("Sqrt", squares)
    # Centre first: the Gram matrix of uncentred tokens, centred afterwards, is off by 4e-4 in float32.
    centred = body.op("Sub", x, body.op("ReduceMean", x, body.ints(1), keepdims=1))
    gram = body.op("MatMul", centred, body.op("Transpose", centred, perm=[0, 2, 1]))  # [N, H, H]
    density, diagonal = _density(body, gram, scorer, heads)
    purity = _sum(body, body.op("Mul", density, density))  # tr A^2
    if scorer is Scorer.ORDER2:
        return _order2(body, purity)
    entropy = _von_neumann(body, density, diagonal, purity, entropy_series(degree), heads)
    if scorer is Scorer.RELEASED and heads > 1:
        entropy = body.op("Mul", entropy, body.number(1.0 / math.log(heads)))
    return entropy


def _density(body: Body, gram: ir.Value, scorer: Scorer, heads: int) -> tuple[ir.Value, ir.Value]:
    """A and its diagonal [N, H]: the Gram matrix / H, of rows divided by their L2 norms but for `released`.

    Norms are divided out on [H, H] instead of on [H, D]: the same numbers for a fraction of the work. A zero
    row stays zero.
    """
    diagonal = body.op("ReduceSum", body.op("Mul", gram, _eye(body, heads)), body.ints(2), keepdims=0)
    if scorer is Scorer.RELEASED:
        share = body.number(1.0 / heads)
        return body.op("Mul", gram, share), body.op("Mul", diagonal, share)
    squares = body.op("Mul", body.op("Max", diagonal, body.number(_TINY)), body.number(heads))
    factor = body.op("Reciprocal", body.op("Sqrt", squares))  # 1 / (norm sqrt(H))
    rows = body.op("Unsqueeze", factor, body.ints(2))
    columns = body.op("Unsqueeze", factor, body.ints(1))
    density = body.op("Mul", gram, body.op("MatMul", rows, columns))
    return density, body.op("Mul", diagonal, body.op("Mul", factor, factor))


def _order2(body: Body, purity: ir.Value) -> ir.Value:
    """-ln tr A^2, and 0 for A = 0. A NaN stays one: it compares as not zero."""
    safe = body.op("Max", purity, body.number(_TINY))
    entropy = body.op("Neg", body.op("Log", safe))
    return body.op("Where", body.op("Equal", purity, body.number(0.0)), body.number(0.0), entropy)


def _von_neumann(
    body: Body, density: ir.Value, diagonal: ir.Value, purity: ir.Value, series: EntropySeries, heads: int
) -> ir.Value:
    """(c - ln s) tr A + b tr A^2 / s + w <A, powers of I - r A / s>, s the Frobenius norm: [N]."""
    norm = body.op("Max", body.op("Sqrt", purity), body.number(_TINY_NORM))
    step = body.op("Div", body.number(series.rate), _matrix(body, norm))
    powers = _powers(body, body.op("Sub", _eye(body, heads), body.op("Mul", density, step)), series)
    inner = body.op("Mul", _sum(body, body.op("Mul", density, powers)), body.number(series.weight))
    curved = body.op("Mul", body.op("Div", purity, norm), body.number(series.slope))
    trace = body.op("ReduceSum", diagonal, body.ints(1), keepdims=0)
    offset = body.op("Sub", body.number(series.constant), body.op("Log", norm))
    return body.op("Add", body.op("Mul", offset, trace), body.op("Add", curved, inner))


def _powers(body: Body, base: ir.Value, series: EntropySeries) -> ir.Value:
    """Sum first Y^2 + Y^4 + .. + Y^degree of Y [N, H, H].

    All products stand before all sums, and bare of factors: then ONNX Runtime takes them in turns and adds
    each product while it is in cache (whole body on one thread: 5.9 ms instead of 7.9).
    """
    powers = [body.op("MatMul", base, base)]
    for _ in range(1, series.squarings):
        powers.append(body.op("MatMul", powers[-1], powers[-1]))
    total = body.op("Mul", powers[0], body.number(series.first))
    for power in powers[1:]:
        total = body.op("Add", total, power)
    return total


def _eye(body: Body, heads: int) -> ir.Value:
    return body.number(np.eye(heads))


def _sum(body: Body, matrices: ir.Value) -> ir.Value:
    """[N, H, H] -> [N]."""
    return body.op("ReduceSum", matrices, body.ints(1, 2), keepdims=0)


def _matrix(body: Body, values: ir.Value) -> ir.Value:
    """[N] -> [N, 1, 1]."""
    return body.op("Unsqueeze", values, body.ints(1, 2))

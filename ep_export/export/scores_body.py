"""The token scores in standard ONNX operators: no eigendecomposition.

`-tr(A ln A)` is the trace of a function of A. With s = ||A||_F the spectrum of A/s lies in [0, 1]; `-x ln x`
there is a Chebyshev series, whose traces `ep_export.entropy.trace_plan` gets from few matrix products. Exact
scores: `ep_export.entropy`; this is the ONNX form of its `chebyshev_scores`.
Everything is float32, whatever the type of the states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ep_export.entropy import trace_plan
from ep_export.policy import Scorer

__all__ = ["Body", "append_scores"]

# Below every value of interest and far above float32's smallest normal number (1.2e-38), so that 1/x and ln x
# stay finite for zero matrices, whose factor is 0 anyway.
_TINY = 1e-30


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
        degree: Degree of the Chebyshev series (entropies only), at least 2.

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
    if scorer is not Scorer.RELEASED:
        gram = _normalise_rows(body, gram, heads)
    gram = body.op("Mul", gram, body.number(1.0 / heads))
    squares = body.op(
        "ReduceSum", body.op("Mul", gram, gram), body.ints(1, 2), keepdims=1
    )  # tr A^2, [N, 1, 1]
    if scorer is Scorer.ORDER2:
        return _order2(body, _flat(body, squares))
    entropy = _von_neumann(body, gram, body.op("Sqrt", squares), heads, degree)
    if scorer is Scorer.RELEASED and heads > 1:
        entropy = body.op("Mul", entropy, body.number(1.0 / math.log(heads)))
    return entropy


def _normalise_rows(body: Body, gram: ir.Value, heads: int) -> ir.Value:
    """Gram matrix of the rows divided by their L2 norms; a zero row stays zero.

    Done on [H, H] instead of on [H, D]: the same numbers for a fraction of the work.
    """
    diagonal = body.op(
        "ReduceSum", body.op("Mul", gram, _eye(body, heads)), body.ints(2), keepdims=1
    )  # [N, H, 1]
    length = body.op("Sqrt", body.op("Max", diagonal, body.number(_TINY)))
    rows = body.op("Div", gram, length)
    return body.op("Div", rows, body.op("Transpose", length, perm=[0, 2, 1]))


def _order2(body: Body, purity: ir.Value) -> ir.Value:
    """-ln tr A^2, and 0 for A = 0. A NaN stays one: it compares as not zero."""
    safe = body.op("Max", purity, body.number(_TINY))
    entropy = body.op("Neg", body.op("Log", safe))
    return body.op("Where", body.op("Equal", purity, body.number(0.0)), body.number(0.0), entropy)


def _von_neumann(body: Body, gram: ir.Value, size: ir.Value, heads: int, degree: int) -> ir.Value:
    """S * (sum_j c_j tr T_j(2A/s - I) - ln(s) tr(A/s)), s the Frobenius norm [N, 1, 1]."""
    safe = body.op("Max", size, body.number(_TINY))
    scaled = body.op("Div", gram, safe)
    eye = _eye(body, heads)
    trace = _sum(body, body.op("Mul", scaled, eye))  # tr(A/s), [N]
    series = _series(body, scaled, eye, heads, degree)
    correction = body.op("Mul", _flat(body, body.op("Log", safe)), trace)
    return body.op("Mul", _flat(body, size), body.op("Sub", series, correction))


def _series(body: Body, scaled: ir.Value, eye: ir.Value, heads: int, degree: int) -> ir.Value:
    """sum_j c_j tr T_j, [N], by `ep_export.entropy.trace_plan`: small steps, big steps, one product."""
    plan = trace_plan(degree)
    first = body.op("Sub", body.op("Mul", scaled, body.number(2.0)), eye)
    small = _powers(body, first, eye, plan.small)
    big = _powers(body, small[-1], eye, plan.big)
    rows = _rows(body, small, heads)
    diagonal = body.op("Gather", rows, body.number(np.arange(heads) * (heads + 1), np.int64), axis=2)
    traces = body.op("ReduceSum", diagonal, body.ints(2), keepdims=1)  # [N, p, 1]
    columns = body.op("Transpose", _rows(body, big, heads), perm=[0, 2, 1])
    inner = body.op("MatMul", rows, columns)  # [N, p, q]
    products = body.op("Mul", inner, body.number(plan.weights[:, 1:]))
    singles = body.op("Mul", traces, body.number(plan.weights[:, :1]))
    total = body.op("Add", _sum(body, products), _sum(body, singles))
    return body.op("Add", total, body.number(plan.constant * heads))


def _powers(body: Body, step: ir.Value, eye: ir.Value, count: int) -> list[ir.Value]:
    """T_1..T_count of a matrix: T_j = 2 M T_{j-1} - T_{j-2}."""
    powers = [eye, step]
    for _ in range(2, count + 1):
        product = body.op("Mul", body.op("MatMul", step, powers[-1]), body.number(2.0))
        powers.append(body.op("Sub", product, powers[-2]))
    return powers[1:]


def _rows(body: Body, matrices: Sequence[ir.Value], heads: int) -> ir.Value:
    """Matrices [N, H, H] as rows: [N, number of matrices, H * H]."""
    flat = [body.op("Reshape", matrix, body.ints(-1, 1, heads * heads)) for matrix in matrices]
    return flat[0] if len(flat) == 1 else body.ops("Concat", flat, 1, axis=1)[0]


def _eye(body: Body, heads: int) -> ir.Value:
    return body.number(np.eye(heads))


def _sum(body: Body, matrices: ir.Value) -> ir.Value:
    """[N, H, H] -> [N]."""
    return body.op("ReduceSum", matrices, body.ints(1, 2), keepdims=0)


def _flat(body: Body, values: ir.Value) -> ir.Value:
    """[N, 1, 1] -> [N]."""
    return body.op("Reshape", values, body.ints(-1))

"""The token scores in standard ONNX operators: no eigendecomposition.

`-tr(A ln A)` is the trace of a function of A. With s = ||A||_F the spectrum of A/s lies in [0, 1], where a
sum over repeated squares stands in for `-x ln x` (`ep_export.entropy.entropy_series`). Exact scores:
`ep_export.entropy`; this is the ONNX form of its `series_scores`.
Everything is float32, whatever the type of the states.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ep_export.entropy.series import EntropySeries, entropy_series
from ep_export.graph import Nodes
from ep_export.policy import Scorer

__all__ = ["append_scores", "scores_model"]

# Below every value of interest and far above float32's smallest normal number (1.2e-38), so that 1/x and ln x
# stay finite for zero matrices, whose factor is 0 anyway.
_TINY = 1e-30
# The same for a norm that comes from squares, which are 0 below 1e-38.
_TINY_NORM = 1e-18


def append_scores(nodes: Nodes, states: ir.Value, scorer: Scorer, heads: int, degree: int) -> ir.Value:
    """Append the nodes of a scorer.

    Args:
        nodes: Where to.
        states: [N, heads, D], any float type.
        scorer: Which score.
        heads: H.
        degree: Degree of the series, one of `policy.DEGREES` (entropies only).

    Returns:
        [N] float32; NaN or infinite where the states are.
    """
    x = nodes.op("Cast", states, to=int(ir.DataType.FLOAT))
    if scorer is Scorer.NORM:
        squares = nodes.op("ReduceSum", nodes.op("Mul", x, x), nodes.ints(1, 2), keepdims=0)
        return nodes.op("Sqrt", squares)
    # Centre first: the Gram matrix of uncentred tokens, centred afterwards, is off by 4e-4 in float32.
    centred = nodes.op("Sub", x, nodes.op("ReduceMean", x, nodes.ints(1), keepdims=1))
    gram = nodes.op("MatMul", centred, nodes.op("Transpose", centred, perm=[0, 2, 1]))  # [N, H, H]
    density, diagonal = _density(nodes, gram, scorer, heads)
    purity = _sum(nodes, nodes.op("Mul", density, density))  # tr A^2
    if scorer is Scorer.ORDER2:
        return _order2(nodes, purity)
    entropy = _von_neumann(nodes, density, diagonal, purity, entropy_series(degree), heads)
    if scorer is Scorer.RELEASED and heads > 1:
        entropy = nodes.op("Mul", entropy, nodes.number(1.0 / math.log(heads)))
    return entropy


def _density(nodes: Nodes, gram: ir.Value, scorer: Scorer, heads: int) -> tuple[ir.Value, ir.Value]:
    """A and its diagonal [N, H]: the Gram matrix / H, of rows divided by their L2 norms but for `released`.

    Norms are divided out on [H, H] instead of on [H, D]: the same numbers for a fraction of the work. A zero
    row stays zero.
    """
    diagonal = nodes.op("ReduceSum", nodes.op("Mul", gram, _eye(nodes, heads)), nodes.ints(2), keepdims=0)
    if scorer is Scorer.RELEASED:
        share = nodes.number(1.0 / heads)
        return nodes.op("Mul", gram, share), nodes.op("Mul", diagonal, share)
    squares = nodes.op("Mul", nodes.op("Max", diagonal, nodes.number(_TINY)), nodes.number(heads))
    factor = nodes.op("Reciprocal", nodes.op("Sqrt", squares))  # 1 / (norm sqrt(H))
    rows = nodes.op("Unsqueeze", factor, nodes.ints(2))
    columns = nodes.op("Unsqueeze", factor, nodes.ints(1))
    density = nodes.op("Mul", gram, nodes.op("MatMul", rows, columns))
    return density, nodes.op("Mul", diagonal, nodes.op("Mul", factor, factor))


def _order2(nodes: Nodes, purity: ir.Value) -> ir.Value:
    """-ln tr A^2, and 0 for A = 0. A NaN stays one: it compares as not zero."""
    safe = nodes.op("Max", purity, nodes.number(_TINY))
    entropy = nodes.op("Neg", nodes.op("Log", safe))
    return nodes.op("Where", nodes.op("Equal", purity, nodes.number(0.0)), nodes.number(0.0), entropy)


def _von_neumann(
    nodes: Nodes, density: ir.Value, diagonal: ir.Value, purity: ir.Value, series: EntropySeries, heads: int
) -> ir.Value:
    """(c - ln s) tr A + b tr A^2 / s + w <A, powers of I - r A / s>, s the Frobenius norm: [N]."""
    norm = nodes.op("Max", nodes.op("Sqrt", purity), nodes.number(_TINY_NORM))
    step = nodes.op("Div", nodes.number(series.rate), _matrix(nodes, norm))
    powers = _powers(nodes, nodes.op("Sub", _eye(nodes, heads), nodes.op("Mul", density, step)), series)
    inner = nodes.op("Mul", _sum(nodes, nodes.op("Mul", density, powers)), nodes.number(series.weight))
    curved = nodes.op("Mul", nodes.op("Div", purity, norm), nodes.number(series.slope))
    trace = nodes.op("ReduceSum", diagonal, nodes.ints(1), keepdims=0)
    offset = nodes.op("Sub", nodes.number(series.constant), nodes.op("Log", norm))
    return nodes.op("Add", nodes.op("Mul", offset, trace), nodes.op("Add", curved, inner))


def _powers(nodes: Nodes, base: ir.Value, series: EntropySeries) -> ir.Value:
    """Sum first Y^2 + Y^4 + .. + Y^degree of Y [N, H, H].

    All products stand before all sums, and bare of factors: then ONNX Runtime takes them in turns and adds
    each product while it is in cache (whole body on one thread: 5.9 ms instead of 7.9).
    """
    powers = [nodes.op("MatMul", base, base)]
    for _ in range(1, series.squarings):
        powers.append(nodes.op("MatMul", powers[-1], powers[-1]))
    total = nodes.op("Mul", powers[0], nodes.number(series.first))
    for power in powers[1:]:
        total = nodes.op("Add", total, power)
    return total


def _eye(nodes: Nodes, heads: int) -> ir.Value:
    return nodes.number(np.eye(heads))


def _sum(nodes: Nodes, matrices: ir.Value) -> ir.Value:
    """[N, H, H] -> [N]."""
    return nodes.op("ReduceSum", matrices, nodes.ints(1, 2), keepdims=0)


def _matrix(nodes: Nodes, values: ir.Value) -> ir.Value:
    """[N] -> [N, 1, 1]."""
    return nodes.op("Unsqueeze", values, nodes.ints(1, 2))


def scores_model(heads: int, head_dim: int, scorer: Scorer, degree: int, *, opset: int = 20) -> ir.Model:
    """The scores alone, for validation and benchmarks: states [N, heads, head_dim] -> scores [N] float32."""
    shape = ir.Shape(("N", heads, head_dim))
    states = ir.Value(name="states", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    nodes = Nodes()
    scores = nodes.op("Identity", append_scores(nodes, states, scorer, heads, degree))
    scores.name = "scores"
    scores.type, scores.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("N",))
    graph = ir.Graph([states], [scores], nodes=nodes.nodes, opset_imports={"": opset}, name="token_scores")
    return ir.Model(graph, ir_version=10, producer_name="ep_export")

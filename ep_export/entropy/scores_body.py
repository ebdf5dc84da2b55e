"""The token scores in standard ONNX operators: no eigendecomposition.

`-tr(A ln A)` is the trace of a function of A. With s = ||A||_F the spectrum of A/s lies in [0, 1], where a
sum over repeated squares stands in for `-x ln x` (`ep_export.entropy.entropy_series`). Exact scores:
`ep_export.entropy`; this is the ONNX form of its `series_scores`.
Everything is float32, whatever the type of the states.

What it costs is passes over [N, H, H] as much as matrix products: ONNX Runtime fuses none of them, and one
addition of two such tensors takes two thirds of a product's time. So powers are not added up; every power
gives its diagonal, [N, H], and the sum is taken there.
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
    x = nodes.to_float(states)
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


def scores_model(heads: int, head_dim: int, scorer: Scorer, degree: int, *, opset: int = 20) -> ir.Model:
    """The scores alone, to be measured: states [N, heads, head_dim] -> scores [N] float32."""
    shape = ir.Shape(("N", heads, head_dim))
    states = ir.Value(name="states", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    nodes = Nodes()
    scores = nodes.op("Identity", append_scores(nodes, states, scorer, heads, degree))
    scores.name = "scores"
    scores.type, scores.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("N",))
    graph = ir.Graph([states], [scores], nodes=nodes.nodes, opset_imports={"": opset}, name="token_scores")
    return ir.Model(graph, ir_version=10, producer_name="ep_export")


def _density(nodes: Nodes, gram: ir.Value, scorer: Scorer, heads: int) -> tuple[ir.Value, ir.Value]:
    """A and its diagonal [N, H]: the Gram matrix / H, of rows divided by their L2 norms but for `released`.

    Norms are divided out on [H, H] instead of on [H, D]: the same numbers for a fraction of the work. A zero
    row stays zero.
    """
    diagonal = _diagonal(nodes, gram, heads)
    if scorer is Scorer.RELEASED:
        share = nodes.number(1.0 / heads)
        return nodes.op("Mul", gram, share), nodes.op("Mul", diagonal, share)
    squares = nodes.op("Mul", nodes.op("Max", diagonal, nodes.number(_TINY)), nodes.number(heads))
    factor = nodes.op("Reciprocal", nodes.op("Sqrt", squares))  # 1 / (norm sqrt(H))
    rows = nodes.op("Unsqueeze", factor, nodes.ints(2))
    columns = nodes.op("Unsqueeze", factor, nodes.ints(1))
    # an outer product first: two products that broadcast a row and a column take half as long again
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
    """Entropy of A: s (curve + weighted traces of I - Y^power) + (slope - ln s) tr A, [N].

    s is the Frobenius norm, Y = I - rate A / s.
    """
    norm = nodes.op("Sqrt", purity)
    bound = nodes.op("Max", norm, nodes.number(_TINY_NORM))
    step = nodes.op("Unsqueeze", nodes.op("Div", nodes.number(series.rate), bound), nodes.ints(1, 2))
    base = nodes.op("Sub", nodes.number(np.eye(heads)), nodes.op("Mul", density, step))
    traces = _weighted_traces(nodes, base, series, heads)
    entropy = nodes.op("Mul", norm, nodes.op("Add", traces, nodes.number(series.curve)))
    trace = nodes.op("ReduceSum", diagonal, nodes.ints(1), keepdims=0)
    offset = nodes.op("Sub", nodes.number(series.slope), nodes.op("Log", bound))
    return nodes.op("Add", entropy, nodes.op("Mul", offset, trace))


def _weighted_traces(nodes: Nodes, base: ir.Value, series: EntropySeries, heads: int) -> ir.Value:
    """Sum of weight tr(I - Y^power) of Y [N, H, H]: [N]. The last power is never formed.

    The order of nodes decides that of ONNX Runtime, which goes back from the outputs and takes the latest
    input first: diagonals stand last and in reverse, so that each is read while its power is in cache.
    """
    powers = [nodes.op("MatMul", base, base)]
    for _ in series.weights[:-1]:
        powers.append(nodes.op("MatMul", powers[-1], powers[-1]))
    last = nodes.op("Sub", nodes.number(heads), _sum(nodes, nodes.op("Mul", powers[-1], powers[-1])))
    last = nodes.op("Mul", last, nodes.number(series.weights[-1]))
    diagonals = [_diagonal(nodes, power, heads) for power in reversed(powers[1:])]
    # every 1 - x is exact where x is near 1; heads minus a sum would not be
    gaps = nodes.op("Sub", nodes.number(1.0), nodes.op("Concat", *diagonals, axis=1))
    weights = np.repeat(series.weights[-2::-1], heads)[:, None]
    total = nodes.op("Squeeze", nodes.op("MatMul", gaps, nodes.number(weights)), nodes.ints(1))
    return nodes.op("Add", total, last)


def _diagonal(nodes: Nodes, matrices: ir.Value, heads: int) -> ir.Value:
    """[N, H, H] -> [N, H]: every (H + 1)th of the H^2 numbers, which takes a third of masking and adding."""
    flat = nodes.op("Reshape", matrices, nodes.ints(-1, heads * heads))
    ends = (nodes.ints(0), nodes.ints(heads * heads), nodes.ints(1), nodes.ints(heads + 1))
    return nodes.op("Slice", flat, *ends)


def _sum(nodes: Nodes, matrices: ir.Value) -> ir.Value:
    """[N, H, H] -> [N]."""
    return nodes.op("ReduceSum", matrices, nodes.ints(1, 2), keepdims=0)

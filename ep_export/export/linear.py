"""Linear layers as Gemm, which reads a weight the way PyTorch stores it.

The exporter writes `MatMul(x, Transpose(weight))`; a runtime then keeps a transposed copy of every weight,
7 GB of a 7 GB model. `Gemm(x, weight, transB=1)` reads the checkpoint's bytes where they lie.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["weights_to_gemm"]


def weights_to_gemm(graph: ir.Graph, weights: set[ir.Value]) -> None:
    """Rewrite every product with a transposed weight in place.

    `MatMul(x, Transpose(w)) [+ bias]` becomes `Gemm(x, w, bias, transB=1)`, with x as a matrix. Refused (left
    alone): transposes of anything but a weight or a reshaped weight, and of more than two axes.

    Args:
        graph: A traced piece.
        weights: The graph inputs that stand for weights.
    """
    matrices: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        weight = _transposed_weight(node, weights)
        if weight is not None:
            for matmul, index in list(node.outputs[0].uses()):
                if matmul.op_type == "MatMul" and index == 1:
                    _rewrite(graph, matmul, weight, weights, matrices)


def _transposed_weight(node: ir.Node, weights: set[ir.Value]) -> ir.Value | None:
    if node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != [1, 0]:
        return None
    source = node.inputs[0]
    origin = source.producer() if source is not None else None
    while origin is not None and origin.op_type in ("Reshape", "Cast"):
        source_of = origin.inputs[0]
        origin = source_of.producer() if source_of is not None else None
        if source_of in weights:
            return source
    return source if source in weights else None


def _rewrite(
    graph: ir.Graph,
    matmul: ir.Node,
    weight: ir.Value,
    weights: set[ir.Value],
    matrices: dict[ir.Value, ir.Value],
) -> None:
    x, result = matmul.inputs[0], matmul.outputs[0]
    assert x is not None  # noqa: S101 - MatMul has two inputs
    last, bias = _bias(matmul, weights)
    shape = last.outputs[0].shape or result.shape
    rank = len(x.shape) if x.shape is not None else 3
    if rank > 2 and x not in matrices:
        flat = _constant(graph, matmul, [-1, _columns(weight)])
        matrices[x] = _insert(graph, matmul, "Reshape", [x, flat]).outputs[0]
    gemm_inputs = [matrices.get(x, x), weight, *([bias] if bias is not None else [])]
    gemm = _insert(graph, last, "Gemm", gemm_inputs, {"transB": 1})
    out = gemm.outputs[0]
    if rank > 2:
        back = _constant(graph, last, [*([1] * (rank - 2)), -1, _rows(weight)])
        out = _insert(graph, last, "Reshape", [out, back]).outputs[0]
    out.shape, out.type = shape, last.outputs[0].type or x.type
    old = last.outputs[0]
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    graph.remove(last)
    if matmul is not last:
        graph.remove(matmul)


def _bias(matmul: ir.Node, weights: set[ir.Value]) -> tuple[ir.Node, ir.Value | None]:
    """The Add of a bias that follows, if one does."""
    uses = list(matmul.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        add, index = uses[0]
        other = add.inputs[1 - index]
        if other in weights and other.shape is not None and len(other.shape) == 1:
            return add, other
    return matmul, None


def _rows(weight: ir.Value) -> int:
    assert weight.shape is not None  # noqa: S101 - weights have static shapes
    return int(weight.shape[0])  # type: ignore[arg-type]


def _columns(weight: ir.Value) -> int:
    assert weight.shape is not None  # noqa: S101
    return int(weight.shape[1])  # type: ignore[arg-type]


def _constant(graph: ir.Graph, before: ir.Node, numbers: list[int]) -> ir.Value:
    return _insert(graph, before, "Constant", [], {"value_ints": numbers}).outputs[0]


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    attributes: dict[str, object] | None = None,
) -> ir.Node:
    node = ir.node(op_type, inputs, attributes)
    graph.insert_before(before, node)
    return node

"""What the recorded operators are in ONNX: one small function each, nothing that moves no number.

Sizes that do not vary are constants; of those that do, a Reshape copies one by place (0) and infers one (-1).
An operator that is not here is refused by name: add its function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeAlias

import torch

from ep_export.export.graph_builder import GraphBuilder, PackedWeight, Tensor, ir_dtype
from ep_export.export.recording import Size, Spec, Varying

__all__ = ["OPERATORS", "Operator", "packed_linear"]

Arguments: TypeAlias = Mapping[str, Any]
Operator = Callable[..., Any]
"""(builder, arguments by name, a `Spec` for every result) -> a `Tensor`, or one for each result in use."""

_END = (1 << 63) - 1


def _unary(op_type: str) -> Operator:
    return lambda graph, given, result: graph.tensor(op_type, [given["self"]], result)


def _arithmetic(op_type: str, *, neutral: float | None = None) -> Operator:
    """Both sides in the result's type; a neutral number on the right changes nothing."""

    def operator(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            raise NotImplementedError(f"{op_type} with {dict(given)}")
        left, right = given["self"], given["other"]
        if right == neutral and isinstance(left, Tensor) and left.spec == result:
            return left
        return graph.tensor(
            op_type, [graph.cast(left, result.dtype), graph.cast(right, result.dtype)], result
        )

    return operator


def _comparison(op_type: str) -> Operator:
    """Both sides in the type they have in common."""

    def operator(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
        sides = given["self"], given["other"]
        samples = [torch.empty(1, dtype=x.spec.dtype) if isinstance(x, Tensor) else x for x in sides]
        dtype = torch.result_type(*samples)
        return graph.tensor(op_type, [graph.cast(side, dtype) for side in sides], result)

    return operator


def _reduction(op_type: str) -> Operator:
    def operator(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
        x = graph.cast(given["self"], result.dtype)
        return graph.tensor(op_type, [x, graph.ints(*given["dim"])], result, keepdims=int(given["keepdim"]))

    return operator


def _alias(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:  # noqa: ARG001
    source: Tensor = given["self"]
    return source


def _to_copy(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.cast(given["self"], result.dtype)


def _view(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.view(given["self"], result.shape)


def _expand(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    source: Tensor = given["self"]
    before = (1,) * (len(result.shape) - len(source.spec.shape)) + source.spec.shape
    if before == result.shape:
        return graph.view(source, result.shape)
    sizes = [1 if old == new else new for old, new in zip(before, result.shape, strict=True)]
    return graph.tensor("Expand", [source, graph.shape(sizes)], result)


def _permute(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    rank = len(result.shape)
    return graph.tensor("Transpose", [given["self"]], result, perm=[dim % rank for dim in given["dims"]])


def _transpose(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    rank = len(result.shape)
    dims = list(range(rank))
    first, second = given["dim0"] % rank, given["dim1"] % rank
    dims[first], dims[second] = second, first
    return _permute(graph, {"self": given["self"], "dims": dims}, result)


def _cat(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    parts = [graph.cast(part, result.dtype) for part in given["tensors"]]
    return graph.tensor("Concat", parts, result, axis=given["dim"])


def _slice(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    source: Tensor = given["self"]
    if source.spec == result:
        return source
    start, end = given["start"] or 0, _END if given["end"] is None else given["end"]
    bounds = [graph.shape([size]) for size in (start, end)]
    return graph.tensor(
        "Slice", [source, *bounds, graph.ints(given["dim"]), graph.ints(given["step"])], result
    )


def _pick(graph: GraphBuilder, source: Tensor, dim: int, index: Size) -> Tensor:
    """One entry of an axis, without the axis."""
    dim %= len(source.spec.shape)
    shape = source.spec.shape[:dim] + source.spec.shape[dim + 1 :]
    if source.spec.shape[dim] == 1:
        several = sum(isinstance(size, Varying) for size in shape) > 1  # which no Reshape infers
        if several:
            return graph.tensor("Squeeze", [source, graph.ints(dim)], Spec(shape, source.spec.dtype))
        return graph.view(source, shape)
    if isinstance(index, Varying):
        raise NotImplementedError("an entry whose place varies")
    return graph.tensor("Gather", [source, graph.whole(index)], Spec(shape, source.spec.dtype), axis=dim)


def _select(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:  # noqa: ARG001
    return _pick(graph, given["self"], given["dim"], given["index"])


def _unbind(graph: GraphBuilder, given: Arguments, *results: Spec) -> Sequence[Tensor]:
    return [_pick(graph, given["self"], given["dim"], index) for index in range(len(results))]


def _split(graph: GraphBuilder, given: Arguments, *results: Spec) -> Sequence[Tensor | PackedWeight]:
    if isinstance(given["self"], PackedWeight):
        return _packed_rows(given["self"], results)
    if given["dim"] == 0 and (parts := graph.stored_rows(given["self"], results)) is not None:
        return parts
    sizes = graph.shape([result.shape[given["dim"]] for result in results])
    return graph.tensors("Split", [given["self"], sizes], results, axis=given["dim"])


def _packed_rows(weight: PackedWeight, parts: Sequence[Spec]) -> list[PackedWeight]:
    """Parts of a quantised weight; its codes stay together."""
    stops = list(accumulate(int(part.shape[0]) for part in parts))  # type: ignore[arg-type]  # stored: known
    return [
        replace(weight, spec=part, rows=(first, stop))
        for part, first, stop in zip(parts, [0, *stops], stops, strict=False)
    ]


def _gather(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.tensor("Gather", [given["self"], given["index"]], result, axis=given["dim"])


def _embedding(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.tensor("Gather", [given["weight"], given["indices"]], result, axis=0)


def _where(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    options = [graph.cast(given[name], result.dtype) for name in ("self", "other")]
    return graph.tensor("Where", [given["condition"], *options], result)


def _clamp(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    bounds = [
        None if given[name] is None else graph.cast(given[name], result.dtype) for name in ("min", "max")
    ]
    return graph.tensor("Clip", [graph.cast(given["self"], result.dtype), *bounds], result)


def _power(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.tensor(
        "Pow", [graph.cast(given[name], result.dtype) for name in ("self", "exponent")], result
    )


def _rsqrt(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.tensor("Reciprocal", [graph.tensor("Sqrt", [given["self"]], result)], result)


def _softmax(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.tensor("Softmax", [graph.cast(given["self"], result.dtype)], result, axis=given["dim"])


def _layer_norm(graph: GraphBuilder, given: Arguments, result: Spec, *_: Spec) -> Sequence[Tensor]:
    axis, inputs = -len(given["normalized_shape"]), [given["input"], given["weight"], given["bias"]]
    return [graph.tensor("LayerNormalization", inputs, result, axis=axis, epsilon=given["eps"])]


def _gelu(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.tensor("Gelu", [given["self"]], result, approximate=given["approximate"])


def _silu(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.tensor("Mul", [given["self"], graph.tensor("Sigmoid", [given["self"]], result)], result)


def _matmul(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    return graph.tensor("MatMul", [given["self"], given["other"]], result)


def _linear(graph: GraphBuilder, given: Arguments, result: Spec) -> Tensor:
    """`Gemm` with `transB` reads a weight where it lies; a runtime transposes the one of a MatMul: a copy.

    That would be 7 GB of a 7 GB model.
    """
    weight: Tensor | PackedWeight = given["weight"]
    x = graph.rows(given["input"])
    if isinstance(weight, PackedWeight):
        return graph.view(packed_linear(graph, x, weight, given.get("bias")), result.shape)
    inputs = [x, weight, *([] if given.get("bias") is None else [given["bias"]])]
    spec = Spec((x.spec.shape[0], weight.spec.shape[0]), result.dtype)
    out = graph.tensor("Gemm", inputs, spec, transB=1)
    return graph.view(out, result.shape)


def packed_linear(graph: GraphBuilder, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """[.., in] -> [.., out] in one form that ONNX Runtime fuses and TensorRT compiles.

    DequantizeLinear over blocks along the inputs, then MatMul, nothing between. Where codes have zeros z, w =
    (code - z) scale, the second part is the sums of x over blocks times -z scale: exact, and the first part
    still fuses. Parts of a layer are slices of its one product.
    """
    out = graph.product(x, weight, lambda: _packed_product(graph, x, weight))
    result = Spec((*x.spec.shape[:-1], weight.spec.shape[0]), x.spec.dtype)
    if weight.rows is not None:
        bounds = [graph.ints(bound) for bound in weight.rows]
        out = graph.tensor("Slice", [out, *bounds, graph.ints(-1)], result)
    return out if bias is None else graph.tensor("Add", [out, bias], result)


def _packed_product(graph: GraphBuilder, x: Tensor, weight: PackedWeight) -> Tensor:
    outputs, inputs = weight.layer.shape[1], weight.layer.shape[0]
    if weight.order is not None:
        x = graph.tensor("Gather", [x, weight.order], x.spec, axis=-1)
    blocks = weight.layer.scales.shape[0]
    whole = {"axis": 1} if blocks == 1 else {"axis": 0, "block_size": inputs // blocks}
    dense = graph.tensor(
        "DequantizeLinear", [weight.codes, weight.scales], Spec((inputs, outputs), x.spec.dtype), **whole
    )
    before = x.spec.shape[:-1]
    result = Spec((*before, outputs), x.spec.dtype)
    out = graph.tensor("MatMul", [x, dense], result)
    if weight.zeros is not None:
        zeros = graph.op("Cast", weight.zeros, to=int(ir_dtype(x.spec.dtype)))
        parts = graph.view(x, (*before, blocks, inputs // blocks))
        sums = graph.tensor(
            "ReduceSum", [parts, graph.ints(-1)], Spec((*before, blocks), x.spec.dtype), keepdims=0
        )
        shift = graph.tensor("MatMul", [sums, graph.op("Mul", zeros, weight.scales)], result)
        out = graph.tensor("Sub", [out, shift], result)
    return out


OPERATORS: Mapping[str, Operator] = {
    **{
        name: _unary(name.capitalize())
        for name in ("cos", "erf", "exp", "log", "neg", "relu", "sigmoid", "sin", "sqrt", "tanh")
    },
    **dict.fromkeys(("alias", "clone", "detach"), _alias),
    **dict.fromkeys(("_unsafe_view", "squeeze", "unsqueeze", "view"), _view),
    "add": _arithmetic("Add"),
    "sub": _arithmetic("Sub"),
    "mul": _arithmetic("Mul", neutral=1),
    "div": _arithmetic("Div", neutral=1),
    "lt": _comparison("Less"),
    "le": _comparison("LessOrEqual"),
    "gt": _comparison("Greater"),
    "ge": _comparison("GreaterOrEqual"),
    "eq": _comparison("Equal"),
    "mean": _reduction("ReduceMean"),
    "sum": _reduction("ReduceSum"),
    "_to_copy": _to_copy,
    "expand": _expand,
    "permute": _permute,
    "t": lambda graph, given, result: _permute(graph, {"self": given["self"], "dims": [1, 0]}, result),
    "transpose": _transpose,
    "cat": _cat,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "split": _split,
    "split_with_sizes": _split,
    "index_select": _gather,
    "embedding": _embedding,
    "where": _where,
    "clamp": _clamp,
    "pow": _power,
    "rsqrt": _rsqrt,
    "_softmax": _softmax,
    "native_layer_norm": _layer_norm,
    "gelu": _gelu,
    "silu": _silu,
    "matmul": _matmul,
    "linear": _linear,
}

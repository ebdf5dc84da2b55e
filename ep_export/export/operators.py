"""What the recorded operators are in ONNX: one small function each, nothing that moves no number.

Sizes that do not vary are constants; of those that do, a Reshape copies one by place (0) and infers one (-1).
An operator that is not here is refused by name: add its function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ep_export.export.graph_builder import GraphBuilder, Tensor
from ep_export.export.recording import Spec

__all__ = ["OPERATORS", "Operator"]

Operator = Callable[[GraphBuilder, Spec, Mapping[str, Any]], Any]
"""(builder, first result, arguments by name) -> a `Tensor`, or one for every result that is used."""

_END = (1 << 63) - 1


def _unary(op_type: str) -> Operator:
    return lambda g, result, a: g.tensor(op_type, [a["self"]], result)


def _arithmetic(op_type: str, *, neutral: float | None = None) -> Operator:
    """Both sides in the result's type; a neutral number on the right changes nothing."""

    def operator(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
        if a.get("alpha", 1) != 1 or a.get("rounding_mode") is not None:
            raise NotImplementedError(f"{op_type} with {dict(a)}")
        left, right = a["self"], a["other"]
        if right == neutral and isinstance(left, Tensor) and left.spec == result:
            return left
        return g.tensor(op_type, [g.cast(left, result.dtype), g.cast(right, result.dtype)], result)

    return operator


def _comparison(op_type: str) -> Operator:
    def operator(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
        left, right = a["self"], a["other"]
        dtype = left.spec.dtype
        if isinstance(right, Tensor):
            dtype = torch.promote_types(dtype, right.spec.dtype)
        return g.tensor(op_type, [g.cast(left, dtype), g.cast(right, dtype)], result)

    return operator


def _reduction(op_type: str) -> Operator:
    def operator(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
        x = g.cast(a["self"], result.dtype)
        return g.tensor(op_type, [x, g.ints(*a["dim"])], result, keepdims=int(a["keepdim"]))

    return operator


def _alias(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:  # noqa: ARG001
    source: Tensor = a["self"]
    return source


def _to_copy(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.cast(a["self"], result.dtype)


def _view(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.view(a["self"], result.shape)


def _expand(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    source: Tensor = a["self"]
    before = (1,) * (len(result.shape) - len(source.spec.shape)) + source.spec.shape
    if before == result.shape:
        return g.view(source, result.shape)
    sizes = [1 if old == new else new for old, new in zip(before, result.shape, strict=True)]
    return g.tensor("Expand", [source, g.shape(sizes)], result)


def _permute(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    rank = len(result.shape)
    return g.tensor("Transpose", [a["self"]], result, perm=[dim % rank for dim in a["dims"]])


def _transpose(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    rank = len(result.shape)
    dims = list(range(rank))
    first, second = a["dim0"] % rank, a["dim1"] % rank
    dims[first], dims[second] = second, first
    return _permute(g, result, {"self": a["self"], "dims": dims})


def _cat(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    parts = [g.cast(part, result.dtype) for part in a["tensors"]]
    return g.tensor("Concat", parts, result, axis=a["dim"])


def _slice(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    source: Tensor = a["self"]
    if source.spec == result:
        return source
    start, end = a["start"] or 0, _END if a["end"] is None else a["end"]
    bounds = [g.shape([size]) for size in (start, end)]
    return g.tensor("Slice", [source, *bounds, g.ints(a["dim"]), g.ints(a["step"])], result)


def _pick(g: GraphBuilder, source: Tensor, dim: int, index: int) -> Tensor:
    """One entry of an axis, without the axis."""
    dim %= len(source.spec.shape)
    shape = source.spec.shape[:dim] + source.spec.shape[dim + 1 :]
    if source.spec.shape[dim] == 1:
        return g.view(source, shape)
    return g.tensor("Gather", [source, g.whole(index)], Spec(shape, source.spec.dtype), axis=dim)


def _select(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:  # noqa: ARG001
    return _pick(g, a["self"], a["dim"], a["index"])


def _unbind(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Sequence[Tensor]:  # noqa: ARG001
    count = a["self"].spec.shape[a["dim"]]
    return [_pick(g, a["self"], a["dim"], index) for index in range(count)]


def _split(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Sequence[Tensor]:
    source: Tensor = a["self"]
    dim = a["dim"] % len(source.spec.shape)
    whole = source.spec.shape[dim]
    sizes = a.get("split_sizes") or a["split_size"]
    if isinstance(sizes, int) and isinstance(whole, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    return g.tensors(
        "Split",
        [source, g.ints(*sizes)],
        [Spec((*result.shape[:dim], size, *result.shape[dim + 1 :]), source.spec.dtype) for size in sizes],
        axis=dim,
    )


def _gather(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.tensor("Gather", [a["self"], a["index"]], result, axis=a["dim"])


def _embedding(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.tensor("Gather", [a["weight"], a["indices"]], result, axis=0)


def _where(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    options = [g.cast(a[name], result.dtype) for name in ("self", "other")]
    return g.tensor("Where", [a["condition"], *options], result)


def _clamp(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    bounds = [None if a[name] is None else g.cast(a[name], result.dtype) for name in ("min", "max")]
    return g.tensor("Clip", [a["self"], *bounds], result)


def _power(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.tensor("Pow", [a["self"], g.cast(a["exponent"], result.dtype)], result)


def _rsqrt(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.tensor("Reciprocal", [g.tensor("Sqrt", [a["self"]], result)], result)


def _softmax(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.tensor("Softmax", [g.cast(a["self"], result.dtype)], result, axis=a["dim"])


def _layer_norm(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Sequence[Tensor]:
    axis, inputs = -len(a["normalized_shape"]), [a["input"], a["weight"], a["bias"]]
    return [g.tensor("LayerNormalization", inputs, result, axis=axis, epsilon=a["eps"])]


def _gelu(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.tensor("Gelu", [a["self"]], result, approximate=a["approximate"])


def _silu(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.tensor("Mul", [a["self"], g.tensor("Sigmoid", [a["self"]], result)], result)


def _matmul(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    return g.tensor("MatMul", [a["self"], a.get("other", a.get("mat2"))], result)


def _linear(g: GraphBuilder, result: Spec, a: Mapping[str, Any]) -> Tensor:
    """`Gemm` with `transB` reads a weight where it lies; a runtime transposes the one of a MatMul: a copy.

    That would be 7 GB of a 7 GB model.
    """
    weight: Tensor = a["weight"]
    x = g.rows(a["input"])
    inputs = [x, weight, *([] if a.get("bias") is None else [a["bias"]])]
    spec = Spec((x.spec.shape[0], weight.spec.shape[0]), result.dtype)
    out = g.tensor("Gemm", inputs, spec, transB=1)
    return g.view(out, result.shape)


_VIEWS = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten")

OPERATORS: Mapping[str, Operator] = {
    **{name: _unary(name.capitalize()) for name in ("neg", "cos", "sin", "sqrt", "sigmoid", "tanh", "exp")},
    **dict.fromkeys(("alias", "detach", "clone", "lift_fresh", "contiguous"), _alias),
    **dict.fromkeys(_VIEWS, _view),
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
    "t": lambda g, result, a: _permute(g, result, {"self": a["self"], "dims": [1, 0]}),
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
    "bmm": _matmul,
    "mm": _matmul,
    "linear": _linear,
}

"""One component under construction: nodes, named inputs and outputs, weights where they lie.

Recorded modules are appended layer by layer; parameters become initializers that point into the checkpoint's
shards, never values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from ep_export.bundle import Precision
from ep_export.checkpoint import TensorRef
from ep_export.export.components import IR_DTYPES
from ep_export.export.recording import Size, Spec, Varying
from ep_export.graph import Nodes
from ep_export.numerics import WeightKind
from ep_export.weights.store import StoredLinear

__all__ = ["TORCH_DTYPES", "GraphBuilder", "PackedWeight", "Tensor", "Weights", "ir_dtype"]

TORCH_DTYPES: Mapping[Precision, torch.dtype] = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}

_CODES = {
    WeightKind.INT4: ir.DataType.INT4,
    WeightKind.INT8: ir.DataType.INT8,
    WeightKind.FP8: ir.DataType.FLOAT8E4M3FN,
}
_IR_VERSION = 10  # opset 20 and 23 both load with it; newer ones are refused by JetPack 6's parser
_PRODUCER = "ep-export"


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value of the graph whose shape is known.

    Attributes:
        value: The value.
        spec: Shape and type.
        base: What it is a view of, if it is one.
    """

    value: ir.Value
    spec: Spec
    base: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A linear layer's weight that is stored quantised; only `linear` reads it.

    Attributes:
        spec: [out, in] in the graph's type.
        layer: What lies in the bundle's own shards.
        codes: [in, out].
        scales: [blocks, out], or [out] where one serves a whole column; in the graph's type.
        zeros: [blocks, out] int8; None where all are 0.
        order: [in] int64; None where inputs are in order.
        rows: Which outputs are meant, where `spec` has fewer than the layer: [first, stop).
    """

    spec: Spec
    layer: StoredLinear
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    order: ir.Value | None
    rows: tuple[int, int] | None = None


Input: TypeAlias = Tensor | ir.Value | None


@dataclass(frozen=True)
class Weights:
    """Where a model's parameters lie.

    Attributes:
        names: id of a parameter -> its name.
        tensors: Name -> its place in the checkpoint.
        place: Where shards lie: (location relative to the .onnx file, the bundle's directory).
        packed: Name -> its place in the bundle's own shards, where it is quantised.
    """

    names: Mapping[int, str]
    tensors: Mapping[str, TensorRef]
    place: Callable[[TensorRef], tuple[str, Path]]
    packed: Mapping[str, StoredLinear] = field(default_factory=dict)


class GraphBuilder(Nodes):
    """One component.

    Args:
        name: Of the component.
        precision: Type of weights after their Cast.
        opset: Opset of the default domain.
        weights: Of the model.
    """

    def __init__(self, name: str, *, precision: Precision, opset: int, weights: Weights) -> None:
        super().__init__()
        self.name, self.opset = name, opset
        self.dtype = TORCH_DTYPES[precision]
        self._weights = weights
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._stored: dict[str, ir.Value] = {}
        self._refs: dict[ir.Value, TensorRef] = {}
        self._casts: dict[tuple[ir.Value, torch.dtype], Tensor] = {}
        self._lengths: dict[Varying, tuple[ir.Value, int]] = {}
        self._targets: dict[tuple[Size, ...], ir.Value] = {}
        self._products: dict[tuple[ir.Value, tuple[Size, ...], ir.Value], Tensor] = {}

    def input(self, name: str, symbols: Sequence[int | str], spec: Spec) -> Tensor:
        """Add a graph input.

        Args:
            name: Its name.
            symbols: Its shape in the interface; a string names an axis that varies.
            spec: Its shape while recording, and its type.
        """
        dtype = ir.TensorType(ir_dtype(spec.dtype))
        value = ir.Value(name=name, type=dtype, shape=ir.Shape(symbols))
        self._inputs.append(value)
        return self._known(Tensor(value, spec))

    def output(self, tensor: Tensor, name: str, symbols: Sequence[int | str]) -> None:
        """Declare a tensor as graph output under its public name."""
        value = tensor.value
        if value in self._outputs or value.producer() is None:
            value = self.op("Identity", value)
        value.name = name
        value.type, value.shape = ir.TensorType(ir_dtype(tensor.spec.dtype)), ir.Shape(symbols)
        self._outputs.append(value)

    @contextmanager
    def scope(self, name: str = "") -> Iterator[None]:
        """Within the block, the names of new values begin with `<name>/`."""
        outside, self._scope = self._scope, name and f"{name}/"
        try:
            yield
        finally:
            self._scope = outside

    def tensors(
        self, op_type: str, inputs: Sequence[Input], specs: Sequence[Spec], **attributes: Any
    ) -> list[Tensor]:
        """Append a node whose outputs are known."""
        values = [each.value if isinstance(each, Tensor) else each for each in inputs]
        outputs = self.ops(op_type, values, len(specs), **attributes)
        for value, spec in zip(outputs, specs, strict=True):
            value.type = ir.TensorType(ir_dtype(spec.dtype))
        return [self._known(Tensor(*pair)) for pair in zip(outputs, specs, strict=True)]

    def tensor(self, op_type: str, inputs: Sequence[Input], spec: Spec, **attributes: Any) -> Tensor:
        """Append a node whose one output is known."""
        return self.tensors(op_type, inputs, [spec], **attributes)[0]

    def number(self, value: Any, dtype: Any = np.float32) -> ir.Value:
        """A constant; all that are equal are one."""
        with self.scope():
            return super().number(value, dtype)

    def constant(self, values: torch.Tensor) -> Tensor:
        """Known values."""
        array = values.float().numpy() if values.is_floating_point() else values.numpy()
        spec = Spec(tuple(values.shape), values.dtype)
        return Tensor(self.number(array, ir_dtype(values.dtype).numpy()), spec)

    def cast(self, source: Tensor | float, dtype: torch.dtype) -> Tensor:
        """In a type; a Cast where it has another, and a number becomes a constant."""
        if not isinstance(source, Tensor):
            return self.constant(torch.tensor(source, dtype=dtype))
        if source.spec.dtype == dtype:
            return source
        key = (source.value, dtype)
        if key not in self._casts:
            spec = Spec(source.spec.shape, dtype)
            self._casts[key] = self.tensor("Cast", [source], spec, to=int(ir_dtype(dtype)))
        return self._casts[key]

    def view(self, source: Tensor, shape: Sequence[Size]) -> Tensor:
        """The same numbers in another shape; a view of a view is one of what that is a view of.

        Raises:
            NotImplementedError: Two sizes vary that the source has not at the same place, and no tensor has
                the second.
        """
        spec = Spec(tuple(shape), source.spec.dtype)
        bases = [source] if source.base is None else [source.base, source]
        for base in bases:
            if base.spec == spec:
                return base
            target = _target(base.spec.shape, spec.shape)
            if target is not None:
                value = self.tensor("Reshape", [base, self.ints(*target)], spec).value
                return Tensor(value, spec, base)
        value = self.tensor("Reshape", [source, self._inferring_first(spec.shape)], spec).value
        return Tensor(value, spec, source)

    def rows(self, source: Tensor) -> Tensor:
        """As a matrix: all axes but the last become one."""
        *before, columns = source.spec.shape
        return source if len(before) == 1 else self.view(source, (_product(before), columns))

    def shape(self, sizes: Sequence[Size]) -> ir.Value:
        """Sizes as a vector of int64; those that vary are read from a tensor that has them.

        Raises:
            NotImplementedError: No tensor has one of them.
        """
        fixed = [size for size in sizes if isinstance(size, int)]
        if len(fixed) == len(sizes):
            return self.ints(*fixed)
        parts = [self._length(size) if isinstance(size, Varying) else self.ints(size) for size in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def weight(self, parameter: torch.nn.Parameter) -> Tensor | PackedWeight:
        """A parameter in the graph's type: a Cast follows where the checkpoint has another.

        A quantised one stays packed: DequantizeLinear belongs next to its product.
        """
        layer = self._weights.packed.get(self._weights.names[id(parameter)])
        if layer is None:
            return self.cast(self.stored(parameter), parameter.dtype)
        codes = self._lying(layer.codes, _CODES[layer.kind], layer.shape)
        whole = layer.scales.shape[0] == 1
        scales = self._lying(
            layer.scales, IR_DTYPES[layer.scales.dtype], layer.scales.shape[1:] if whole else None
        )
        zeros = None if layer.zeros is None else self._lying(layer.zeros, ir.DataType.INT8)
        order = None if layer.order is None else self._lying(layer.order, ir.DataType.INT64)
        return PackedWeight(Spec(tuple(parameter.shape), parameter.dtype), layer, codes, scales, zeros, order)

    def product(self, x: Tensor, weight: PackedWeight, compute: Callable[[], Tensor]) -> Tensor:
        """[.., out] of a whole layer, appended by `compute` once, however many parts of it are read."""
        key = ((x.base or x).value, x.spec.shape, weight.codes)
        if key not in self._products:
            self._products[key] = compute()
        return self._products[key]

    def stored(self, parameter: torch.nn.Parameter) -> Tensor:
        """A parameter in the checkpoint's type: the initializer says where in the shard it lies."""
        name = self._weights.names[id(parameter)]
        return self._at(replace(self._weights.tensors[name], name=name))

    def stored_rows(self, source: Tensor, specs: Sequence[Spec]) -> list[Tensor] | None:
        """A stored tensor cut along its first axis: every part lies somewhere too; None: it is computed."""
        node = source.value.producer()
        origin = node.inputs[0] if node is not None and node.op_type == "Cast" else source.value
        if origin not in self._refs:
            return None
        ref, start, parts = self._refs[origin], 0, []
        row = ref.length // ref.shape[0]
        for spec in specs:
            rows = spec.shape[0]
            assert isinstance(rows, int)  # noqa: S101 - of a stored tensor
            part = replace(
                ref,
                name=f"{origin.name}[{start}:{start + rows}]",
                offset=ref.offset + start * row,
                length=rows * row,
                shape=(rows, *ref.shape[1:]),
            )
            parts.append(self.cast(self._at(part), spec.dtype))
            start += rows
        return parts

    def _at(self, ref: TensorRef) -> Tensor:
        """What lies in a shard, in its own type."""
        value = self._lying(ref, IR_DTYPES[ref.dtype])
        self._refs[value] = ref
        return Tensor(value, Spec(ref.shape, getattr(torch, ref.dtype)))

    def _lying(self, ref: TensorRef, dtype: ir.DataType, shape: tuple[int, ...] | None = None) -> ir.Value:
        """An initializer that says where in a shard its bytes lie."""
        name, sizes = ref.name, ir.Shape(shape or ref.shape)
        if name not in self._stored:
            location, base = self._weights.place(ref)
            lying = ir.ExternalTensor(
                location, ref.offset, ref.length, dtype, shape=sizes, name=name, base_dir=base
            )
            self._stored[name] = ir.Value(
                name=name, type=ir.TensorType(dtype), shape=sizes, const_value=lying
            )
        return self._stored[name]

    def model(self) -> ir.Model:
        """The finished graph: what no output needs is left out."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self.nodes,
            initializers=list(self._stored.values()),
            opset_imports={"": self.opset, **{node.domain: 1 for node in self.nodes if node.domain}},
            name=self.name,
        )
        model = ir.Model(graph, ir_version=_IR_VERSION, producer_name=_PRODUCER)
        RemoveUnusedNodesPass()(model)
        _drop_unread_outputs(graph)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        return model

    def _inferring_first(self, shape: tuple[Size, ...]) -> ir.Value:
        """What a Reshape is told where several sizes vary: the first is inferred, the others are read."""
        if shape not in self._targets:
            first = next(axis for axis, size in enumerate(shape) if isinstance(size, Varying))
            with self.scope():  # it belongs to no layer: all of them read it
                self._targets[shape] = self.shape((*shape[:first], -1, *shape[first + 1 :]))
        return self._targets[shape]

    def _known(self, tensor: Tensor) -> Tensor:
        for axis, size in enumerate(tensor.spec.shape):
            if isinstance(size, Varying):
                self._lengths.setdefault(size, (tensor.value, axis))
        return tensor

    def _length(self, size: Varying) -> ir.Value:
        if size not in self._lengths:
            raise NotImplementedError(f"no tensor has the size {size}")
        return self.length(*self._lengths[size])


def _drop_unread_outputs(graph: ir.Graph) -> None:
    """Of other domains' operators, whose optional outputs the pass does not know: no name, not computed."""
    for node in graph:
        for value in node.outputs if node.domain else ():
            if not value.uses() and not value.is_graph_output():
                value.name = ""


def ir_dtype(dtype: torch.dtype) -> ir.DataType:
    """ONNX's name of a type."""
    return IR_DTYPES[str(dtype).removeprefix("torch.")]


def _target(source: Sequence[Size], shape: Sequence[Size]) -> list[int] | None:
    """What a Reshape is told: 0 copies the size at that place, -1 infers one; None where two would vary."""
    target = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            target.append(size)
        else:
            target.append(0 if axis < len(source) and source[axis] == size else -1)
    return target if target.count(-1) <= 1 else None


def _product(sizes: Sequence[Size]) -> Size:
    small = math.prod(size if isinstance(size, int) else size.small for size in sizes)
    large = math.prod(size if isinstance(size, int) else size.large for size in sizes)
    return small if small == large else Varying(small, large)

"""Building one component: pieces are stamped into a graph with each layer's own weights.

A `Component` graph owns named inputs, references to checkpoint tensors (by place, never by value), a pool of
shared constants, and the nodes of every piece stamped into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ep_export.bundle import Component, Precision, TensorSpec
from ep_export.checkpoint import TensorRef
from ep_export.export.trace import Piece

__all__ = ["IR_DTYPES", "TORCH_DTYPES", "GraphBuilder", "WeightPlace"]

IR_DTYPES: Mapping[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}
TORCH_DTYPES: Mapping[Precision, torch.dtype] = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}
_PRECISION_IR = {
    Precision.FP32: ir.DataType.FLOAT,
    Precision.FP16: ir.DataType.FLOAT16,
    Precision.BF16: ir.DataType.BFLOAT16,
}
_IR_VERSION = 10  # opset 20 and 23 both load with it; newer ones are refused by JetPack 6's parser
_PRODUCER = "ep-export"

WeightPlace = Callable[[TensorRef], tuple[str, Path]]
"""Where a tensor's shard lies: (location relative to the .onnx file, the bundle's directory)."""


class GraphBuilder:
    """One ONNX component under construction.

    Args:
        name: Component name.
        precision: Type of weights after their Cast.
        opset: Opset of the default domain.
        tensors: Parameter name in the Hugging Face model -> its place in the checkpoint.
        place: Where shards lie in the bundle.
    """

    def __init__(
        self,
        name: str,
        *,
        precision: Precision,
        opset: int,
        tensors: Mapping[str, TensorRef],
        place: WeightPlace,
    ) -> None:
        self.name = name
        self.dtype = _PRECISION_IR[precision]
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name=name)
        self._functions: list[ir.Function] = []
        self._tensors, self._place = tensors, place
        self._weights: dict[tuple[str, bool], ir.Value] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input; a string in `shape` names a dynamic axis."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a value as graph output under its public name."""
        if value.is_graph_input() or value.is_graph_output() or value.producer() is None:
            value = self.op("Identity", [value])
        value.name = name
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        """Append one node with one output."""
        node = ir.node(op_type, inputs, dict(attributes or {}))
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small shared constant."""
        return self._shared(ir.tensor(np.asarray(value, dtype=dtype)))

    def call(
        self, function: ir.Function, inputs: Sequence[ir.Value], attributes: Mapping[str, str]
    ) -> list[ir.Value]:
        """Append a call of a model-local function, shipping its body along."""
        if function not in self._functions:
            self._functions.append(function)
            self.graph.opset_imports[function.domain] = 1
        node = ir.node(
            function.name, inputs, dict(attributes), domain=function.domain, num_outputs=len(function.outputs)
        )
        node.name = function.name
        self.graph.append(node)
        return list(node.outputs)

    def weight(self, name: str, *, cast: bool = True) -> ir.Value:
        """A checkpoint tensor, followed by a Cast when its type is not the graph's.

        The data stays in the shard: the initializer says where it lies.
        """
        ref = self._tensors[name]
        if (name, False) not in self._weights:
            self._weights[(name, False)] = self._initializer(name, ref)
        stored = self._weights[(name, False)]
        if not cast or IR_DTYPES[ref.dtype] == self.dtype:
            return stored
        if (name, True) not in self._weights:
            self._weights[(name, True)] = self.op("Cast", [stored], {"to": int(self.dtype)})
        return self._weights[(name, True)]

    def stamp(
        self, piece: Piece, inputs: Sequence[ir.Value], weight_names: Mapping[str, str], prefix: str
    ) -> list[ir.Value]:
        """Append a copy of a piece.

        Args:
            piece: What was traced.
            inputs: Values of this graph, one for each input of the piece.
            weight_names: Parameter name in the piece -> in the Hugging Face model.
            prefix: Put before the names of the copied values.

        Returns:
            The values of this graph that stand for the piece's outputs.
        """
        known: dict[ir.Value, ir.Value] = dict(zip(piece.inputs, inputs, strict=True))
        for name, inner in piece.weights.items():
            if name in piece.buffers:
                known[inner] = self._shared(ir.tensor(piece.buffers[name].numpy()))
            else:
                known[inner] = self.weight(weight_names[name])
        for inner in piece.constants:
            assert inner.const_value is not None  # noqa: S101 - weights became inputs when traced
            known[inner] = self._shared(inner.const_value)
        for node in piece.nodes:
            self._copy(node, known, prefix)
        return [known[value] for value in piece.outputs]

    def save(self, directory: Path) -> Component:
        """Write `<name>.onnx` and describe its interface."""
        for number, node in enumerate(self.graph):
            node.name = node.name or f"{node.op_type}_{number}"
            for value in node.outputs:
                if value.name is None:
                    value.name = f"{node.op_type.lower()}_{number}"
        model = ir.Model(
            self.graph, ir_version=_IR_VERSION, producer_name=_PRODUCER, functions=self._functions
        )
        file = f"{self.name}.onnx"
        ir.save(model, directory / file)
        return Component(
            self.name, file, tuple(map(_spec, self.graph.inputs)), tuple(map(_spec, self.graph.outputs))
        )

    def _initializer(self, name: str, ref: TensorRef) -> ir.Value:
        location, base = self._place(ref)
        dtype, shape = IR_DTYPES[ref.dtype], ir.Shape(ref.shape)
        tensor = ir.ExternalTensor(
            location, ref.offset, ref.length, dtype, shape=shape, name=name, base_dir=base
        )
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def _shared(self, tensor: ir.TensorProtocol) -> ir.Value:
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if key not in self._constants:
            name = f"const_{len(self._constants)}"
            value = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tuple(tensor.numpy().shape)),
                const_value=_owned(tensor, name),
            )
            self.graph.initializers[name] = value
            self._constants[key] = value
        return self._constants[key]

    def _copy(self, node: ir.Node, known: dict[ir.Value, ir.Value], prefix: str) -> None:
        if node.op_type == "Identity":  # the exporter's way to name an output
            known[node.outputs[0]] = known[node.inputs[0]]  # type: ignore[index]  # it has one input
            return
        if node.op_type == "Constant":
            known[node.outputs[0]] = self._shared(_constant_value(node))
            return
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else known[value] for value in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
            name=f"{prefix}/{node.outputs[0].name}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = f"{prefix}/{old.name}", old.type
            known[old] = new
        self.graph.append(copy)


def _constant_value(node: ir.Node) -> ir.TensorProtocol:
    name, attribute = next(iter(node.attributes.items()))
    if name == "value":
        return attribute.as_tensor()
    kinds = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    return ir.tensor(np.asarray(attribute.value, dtype=kinds[name]))


def _owned(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A copy that keeps no piece alive."""
    return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None and value.dtype is not None and value.name is not None  # noqa: PT018, S101
    names = {kind: name for name, kind in IR_DTYPES.items()}
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, names[value.dtype], shape)

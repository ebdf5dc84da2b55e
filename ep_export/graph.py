"""Nodes of an ONNX graph or function under construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["LoopStep", "Nodes"]

LoopStep = Callable[["Nodes", Sequence[ir.Value]], tuple[Sequence[ir.Value], Sequence[ir.Value]]]
"""(nodes of the body, iteration [] int64 and states) -> (the next states, rows to stack over iterations)."""


class Nodes:
    """Nodes in order, constants as nodes: functions have no initializers.

    Args:
        scope: Precedes every name: a subgraph may not reuse names of the graph around it.
    """

    def __init__(self, scope: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self._scope = scope
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node of the default domain with one output."""
        return self.ops(op_type, inputs, 1, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        node.name = f"{self._scope}{op_type}_{len(self.nodes)}"
        for i, value in enumerate(node.outputs):
            value.name = f"{self._scope}{op_type.lower()}_{len(self.nodes)}" + (f"_{i}" if i else "")
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

    def whole(self, value: int) -> ir.Value:
        """A scalar of int64."""
        return self.number(value, np.int64)

    def to_float(self, value: ir.Value) -> ir.Value:
        """The same numbers in float32."""
        return self.op("Cast", value, to=int(ir.DataType.FLOAT))

    def length(self, value: ir.Value, axis: int = 0) -> ir.Value:
        """Length of an axis: [1] int64."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def indices(self, length: ir.Value) -> ir.Value:
        """0, 1, .., length - 1 for a length [1]: int64."""
        return self.op("Range", self.whole(0), self.op("Squeeze", length), self.whole(1))

    def loop(self, trips: ir.Value, states: Sequence[ir.Value], step: LoopStep) -> Sequence[ir.Value]:
        """Append a `Loop` of a known number of steps.

        Args:
            trips: [] int64, at least 1: ONNX Runtime does not know the shape of no rows.
            states: What the first step gets.
            step: Appends one step to the nodes it is given.

        Returns:
            The states after the last step, then the stacked rows.
        """
        scope = f"{self._scope}loop_{len(self.nodes)}_"
        inner = Nodes(scope)
        names = ["iteration", "condition", *(f"state_{i}" for i in range(len(states)))]
        inputs = [ir.Value(name=scope + name) for name in names]
        inputs[0].type, inputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape(())
        inputs[1].type, inputs[1].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape(())
        after, rows = step(inner, [inputs[0], *inputs[2:]])
        outputs = [inner.op("Identity", value) for value in (inputs[1], *after, *rows)]
        body = ir.Graph(inputs, outputs, nodes=inner.nodes, name=f"{scope}body")
        condition = self.number(True, np.bool_)
        return self.ops("Loop", (trips, condition, *states), len(states) + len(rows), body=body)

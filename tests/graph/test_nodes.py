"""Nodes under construction: names, shared constants, loops."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from ep_export.graph import Nodes


def run(nodes: Nodes, x: ir.Value, output: ir.Value, dims: int, feed: np.ndarray) -> np.ndarray:
    output.type, output.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None] * dims)
    graph = ir.Graph([x], [output], nodes=nodes.nodes, opset_imports={"": 20}, name="graph")
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": feed})[0]


def vector() -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(("N",)))


def test_equal_constants_are_one_node_and_types_tell_them_apart() -> None:
    nodes = Nodes()
    assert nodes.number(1.0) is nodes.number(1)
    assert nodes.whole(1) is not nodes.number(1)
    assert nodes.ints(1) is not nodes.whole(1)
    assert len(nodes.nodes) == 3


def test_lengths_and_indices_follow_the_input() -> None:
    nodes, x = Nodes(), vector()
    output = nodes.op("Identity", nodes.indices(nodes.length(x)))
    assert run(nodes, x, output, 1, np.zeros(4, np.int64)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("trips", [1, 5])
def test_a_loop_carries_states_stacks_rows_and_reads_values_around_it(trips: int) -> None:
    nodes, x = Nodes(), vector()

    def step(inner: Nodes, values: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        iteration, total = values
        total = inner.op("Add", total, inner.op("Mul", x, inner.op("Add", iteration, inner.whole(1))))
        return [total], [total]

    total, rows = nodes.loop(nodes.whole(trips), [nodes.ints(0, 0)], step)
    everything = nodes.op("Concat", nodes.op("Unsqueeze", total, nodes.ints(0)), rows, axis=0)
    triangular = [n * (n + 1) // 2 for n in range(trips + 1)]
    expected = [[n, 10 * n] for n in (triangular[-1], *triangular[1:])]
    assert run(nodes, x, everything, 2, np.array([1, 10])).tolist() == expected


def test_loops_in_loops_share_no_name() -> None:
    nodes = Nodes()

    def outer(inner: Nodes, values: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        return list(inner.loop(inner.whole(2), [values[1]], lambda n, v: ([n.op("Add", v[1], v[0])], []))), []

    nodes.loop(nodes.whole(2), [nodes.whole(0)], outer)
    names: list[str | None] = []

    def collect(found: list[ir.Node]) -> None:
        for node in found:
            names.extend(value.name for value in node.outputs)
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.GRAPH:
                    names.extend(value.name for value in attribute.value.inputs)
                    collect(list(attribute.value))

    collect(nodes.nodes)
    assert len(set(names)) == len(names) > 10

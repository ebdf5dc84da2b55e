"""Reshape targets as constants wherever one -1 and copied axes (0) can say them.

Traced reshapes compute their target from Shape, Gather and Concat nodes. Runtimes plan better without: the
chains cost time in every decode step, and TensorRT treats them as shape tensors.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["constant_reshapes"]


def constant_reshapes(graph: ir.Graph) -> None:
    """Rewrite reshape targets in place.

    An axis of known size is written as such; a varying axis as 0 when the input has the same size at the same
    place, else as -1. Refused: targets that would need two -1, and unknown shapes. The dead chains are left
    to whoever copies the live nodes.
    """
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        source, target = node.inputs[0], node.inputs[1]
        if target is None or target.const_value is not None or _is_constant(target):
            continue
        sizes = _target(source, node.outputs[0])
        if sizes is None:
            continue
        constant = ir.node("Constant", [], {"value_ints": sizes})
        graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def _target(source: ir.Value | None, result: ir.Value) -> list[int] | None:
    if source is None or source.shape is None or result.shape is None:
        return None
    sizes: list[int] = []
    for axis, dim in enumerate(result.shape):
        if isinstance(dim, int):
            sizes.append(dim)
        elif (
            axis < len(source.shape) and not isinstance(source.shape[axis], int) and source.shape[axis] == dim
        ):
            sizes.append(0)
        else:
            sizes.append(-1)
    unknown = any(not isinstance(dim, int) and dim.value is None for dim in result.shape)
    return (
        None
        if sizes.count(-1) > 1 or 0 in [s for s in result.shape if isinstance(s, int)] or unknown
        else sizes
    )

"""A finished graph becomes a file of the bundle and its description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ep_export.bundle import Component, Precision, Role, TensorSpec
from ep_export.numerics import TYPES

__all__ = ["IR_DTYPES", "PRECISION_DTYPES", "save_component"]

IR_DTYPES: Mapping[str, ir.DataType] = {kind.name: ir.DataType[kind.onnx] for kind in TYPES.values()}
PRECISION_DTYPES: Mapping[Precision, ir.DataType] = {
    Precision.FP32: ir.DataType.FLOAT,
    Precision.FP16: ir.DataType.FLOAT16,
    Precision.BF16: ir.DataType.BFLOAT16,
}
_NAMES = {kind: name for name, kind in IR_DTYPES.items()}


def save_component(model: ir.Model, directory: Path, name: str, role: Role, **place: Any) -> Component:
    """Write `<name>.onnx` and describe its interface.

    Args:
        model: Named and typed; weights lie outside of it.
        directory: The bundle's.
        name: Of the component.
        role: Of the component.
        place: What the role adds to a `Component`: layers, or cut and chooser.
    """
    file = f"{name}.onnx"
    ir.save(model, directory / file)
    inputs, outputs = (tuple(map(_spec, values)) for values in (model.graph.inputs, model.graph.outputs))
    return Component(name, file, role, inputs, outputs, **place)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None and value.dtype is not None and value.name is not None  # noqa: PT018, S101
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, _NAMES[value.dtype], shape)

"""Weights of a type the target has not: bfloat16 tables for a GPU that knows only float16 and float32.

Published checkpoints store bfloat16, and graphs of another precision cast it when they run. A compiler for
Turing refuses the mere presence of the type, so its components get their tables converted beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Bundle, Component, Precision
from ep_export.runtime.bfloat16 import widen

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["without_bfloat16"]


def without_bfloat16(bundle: Bundle, component: Component, directory: Path) -> Path:
    """The component with every bfloat16 table in the graph's own precision.

    Args:
        bundle: Its graphs are float16 or float32.
        component: Of that bundle.
        directory: Where a changed copy is written, with all its weights.

    Returns:
        The bundle's own file where there was nothing to convert.

    Raises:
        UserError: A table lies outside the bundle.
    """
    import onnx_ir as ir

    source = bundle.file(component.file)
    model = ir.load(source)
    if not any(v.dtype == ir.DataType.BFLOAT16 for v in model.graph.initializers.values()):
        return source
    kinds = {Precision.FP32: ir.DataType.FLOAT, Precision.FP16: ir.DataType.FLOAT16}
    kind = kinds[bundle.manifest.precision]
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _table(bundle, value.const_value, kind)
            value.dtype = value.const_value.dtype
    for node in model.graph:  # what the exporter noted about values that hold rows of such a table
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = kind
    copy = directory / source.name
    ir.save(model, copy, external_data=f"{source.stem}.weights")
    return copy


def _table(bundle: Bundle, stored: ir.ExternalTensor, kind: ir.DataType) -> ir.LazyTensor:
    """A table as it is to be written, read when it is written: one at a time is in memory.

    onnx-ir itself refuses to read shards that are hard links, which is how they lie in a bundle.
    """
    import onnx_ir as ir

    bfloat16 = stored.dtype == ir.DataType.BFLOAT16
    dtype = kind if bfloat16 else stored.dtype
    file, shape, name = bundle.file(str(stored.location)), tuple(stored.shape.numpy()), stored.name
    offset, raw_type = stored.offset or 0, np.dtype(np.uint16) if bfloat16 else stored.dtype.numpy()

    def read() -> ir.TensorProtocol:
        raw: NDArray[Any] = np.memmap(file, dtype=raw_type, mode="r", offset=offset, shape=shape)
        return ir.Tensor(widen(raw).astype(kind.numpy()) if bfloat16 else raw, dtype=dtype, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)

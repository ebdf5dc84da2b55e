"""What a compiler reads: a component's own file, or a copy of it changed for the target.

Copies lie in a directory of the caller's, with all the weights they refer to: nothing is written into the
bundle, which may be read-only or in use.

- A cache that rows are written into has a fixed capacity in TensorRT, which graphs leave open.
- TensorRT before 10.7 prefers a node's ONNX body to the plugin, so for the plugin the body is cut out.
- Published checkpoints store bfloat16, and graphs of another precision cast it when they run. A compiler for
  Turing refuses the mere presence of the type, so its components get their tables converted beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Bundle, Component, Precision, Role
from ep_export.engine_record import Limits
from ep_export.runtime.bfloat16 import widen

if TYPE_CHECKING:
    import onnx_ir as ir

    from ep_export.targets import Target

__all__ = ["compiler_source", "has_open_capacity", "write_settled", "write_stripped"]

_CAPACITY = "C"
_WEIGHTS = "weights"


def compiler_source(
    bundle: Bundle, component: Component, target: Target, limits: Limits, directory: Path, *, plugin: bool
) -> Path:
    """The file that the compiler is to read.

    Args:
        bundle: Of graphs that the target takes.
        component: Of that bundle.
        target: What it is compiled for.
        limits: What the engine must be able to do.
        directory: Where a changed copy is written.
        plugin: Whether the plugin takes the place of this component's node.

    Returns:
        The bundle's own file where nothing had to be changed.

    Raises:
        UserError: A table lies outside the bundle.
    """
    source = bundle.file(component.file)
    if plugin and target.strips_body:
        return write_stripped(source, directory / source.name)
    if has_open_capacity(component):
        rows = limits.at(component, bundle.manifest.schedule).capacity
        source = write_settled(source, directory / source.name, rows)
        _link_weights(bundle, directory)
    if Precision.BF16 in target.dtypes:
        return source
    return _without_bfloat16(bundle, source, directory / source.name)


def has_open_capacity(component: Component) -> bool:
    """Whether it has caches whose capacity compiling settles."""
    return component.role is Role.DECODER and any(_CAPACITY in spec.shape for spec in component.inputs)


def write_settled(source: Path, copy: Path, capacity: int) -> Path:
    """Copy a span with the capacity of its caches settled; it refers to weights beside the copy."""
    import onnx_ir as ir

    model = ir.load(source)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([capacity if str(axis) == _CAPACITY else axis for axis in value.shape])
    ir.save(model, copy)
    return copy


def _link_weights(bundle: Bundle, directory: Path) -> None:
    """Let copies in a directory refer to the bundle's weights as the bundle's own files do."""
    link = directory / _WEIGHTS
    if not link.exists():
        link.symlink_to(bundle.file(_WEIGHTS).absolute(), target_is_directory=True)


def write_stripped(source: Path, copy: Path) -> Path:
    """Copy a prune component without the body of its node.

    Raises:
        ValueError: The component has weights outside its file; prune components have none.
    """
    import onnx_ir as ir

    model = ir.load(source)
    if _external(model):
        raise ValueError(f"{source} refers to weights, which a copy elsewhere would lose")
    model.functions.clear()
    ir.save(model, copy)
    return copy


def _without_bfloat16(bundle: Bundle, source: Path, copy: Path) -> Path:
    """The component with every bfloat16 table in the graph's own precision."""
    import onnx_ir as ir

    model = ir.load(source)
    if not any(v.dtype == ir.DataType.BFLOAT16 for v in model.graph.initializers.values()):
        return source
    kinds = {Precision.FP32: ir.DataType.FLOAT, Precision.FP16: ir.DataType.FLOAT16}
    kind = kinds[bundle.manifest.precision]
    for value in _external(model):
        value.const_value = _table(bundle, value.const_value, kind)
        value.dtype = value.const_value.dtype
    for node in model.graph:  # what the exporter noted about values that hold rows of such a table
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = kind
    ir.save(model, copy, external_data=f"{copy.stem}.weights")
    return copy


def _external(model: ir.Model) -> list[Any]:
    """Initializers whose values lie in another file."""
    import onnx_ir as ir

    values = model.graph.initializers.values()
    return [value for value in values if isinstance(value.const_value, ir.ExternalTensor)]


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

"""The embedding table on the host: rows are read from the bundle's mapped shard, the table itself never.

A prompt needs hundreds of rows and a decode step one, of a table of up to a gigabyte. In the memory of a GPU
it would take the place of something that computes; pages of a mapped file are dropped where memory is short.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Bundle, Component
from ep_export.errors import UserError
from ep_export.numerics import TYPES
from ep_export.runtime.base import Feed, Runner, Value
from ep_export.runtime.bfloat16 import narrow, widen
from ep_export.safetensors_index import TensorRef, map_tensor

__all__ = ["EmbeddingRows"]

_STORED = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
"""Types of a table -> as NumPy reads them; bfloat16 as its bits, which needs no further package."""
_BFLOAT16 = "bfloat16"
_HINT = "build the bundle again with `ep-export build`"


@dataclass(frozen=True)
class _HostValue:
    """An array behind the `Value` contract."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def numpy(self) -> NDArray[Any]:
        return self.array


class EmbeddingRows(Runner):
    """`input_ids` [B,S] int64 -> `inputs_embeds` [B,S,d], as the component's ONNX file computes it.

    Args:
        bundle: The bundle.
        component: With the role embed and a `table`.

    Raises:
        UserError: The table does not lie in the bundle as the manifest says.
    """

    def __init__(self, bundle: Bundle, component: Component) -> None:
        (ids,), (embeds,) = component.inputs, component.outputs
        self.input_names, self.output_names = (ids.name,), (embeds.name,)
        self._compute = embeds.dtype
        self._table: NDArray[Any] | None = _map_table(bundle, component)
        self._stored = component.table.dtype if component.table is not None else ""

    def run(self, feeds: Mapping[str, Feed], *, on_device: Collection[str] = ()) -> dict[str, Value]:  # noqa: ARG002 - the contract's
        """See `Runner.run`; rows stay on the host, bfloat16 ones as float32."""
        if tuple(feeds) != self.input_names or self._table is None:
            raise UserError(f"the embedding table takes {self.input_names[0]}, not {sorted(feeds)}")
        feed = feeds[self.input_names[0]]
        ids = feed if isinstance(feed, np.ndarray) else feed.numpy()
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self._table):
            raise UserError(
                f"token ids reach from {ids.min()} to {ids.max()}, expected 0 to {len(self._table) - 1}"
            )
        return {self.output_names[0]: _HostValue(self._cast(self._table[ids]))}

    def close(self) -> None:
        """See `Runner.close`."""
        self._table = None

    def _cast(self, rows: NDArray[Any]) -> NDArray[Any]:
        if self._stored == _BFLOAT16:
            rows = widen(rows)
        if self._compute == _BFLOAT16:
            return rows if self._stored == _BFLOAT16 else widen(narrow(rows))
        with np.errstate(over="ignore"):  # infinity, as in any runtime
            return rows.astype(self._compute, copy=False)


def _map_table(bundle: Bundle, component: Component) -> NDArray[Any]:
    table, width = component.table, bundle.manifest.dims.hidden_size
    if table is None or table.dtype not in _STORED or component.outputs[0].dtype not in _STORED:
        raise UserError(f"component {component.name} of {bundle.path} has no table of floats", hint=_HINT)
    file, (rows, columns) = bundle.file(table.file), table.shape
    length = math.prod(table.shape) * TYPES[table.dtype].bits // 8
    if rows < 1 or columns != width or table.offset < 0:
        raise UserError(
            f"the embedding table of {bundle.path} is said to be {rows} x {columns} from byte {table.offset} "
            f"on, expected rows of {width} values",
            hint=_HINT,
        )
    if not file.is_file() or file.stat().st_size < table.offset + length:
        raise UserError(
            f"{file} is missing or too short for the embedding table: {length} bytes from {table.offset} on",
            hint=_HINT,
        )
    return map_tensor(
        TensorRef(component.name, file, table.offset, length, _STORED[table.dtype], table.shape)
    )

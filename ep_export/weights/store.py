"""Quantised layers in a bundle's own shards: written one at a time, read back one at a time.

A shard is a safetensors file. A layer named `n` is up to four tensors: `n.codes` (U8: two codes of int4 a
byte, row-major [in, out]; I8; or F8_E4M3), `n.scales` [blocks, out] in the type graphs compute in, and where
there are any `n.zeros` I8 [blocks, out] and `n.order` I64 [in]. Its header is written last, into space kept
for it: sizes are known only when a layer is rounded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Bundle
from ep_export.errors import UserError
from ep_export.numerics import TYPES, WeightKind
from ep_export.safetensors_index import DTYPES, TensorRef, read_shard, read_tensor
from ep_export.weights.packed import PackedLinear, nibbles, unpack_nibbles

__all__ = ["FILE", "LayerWriter", "StoredLinear", "bundle_layers", "read_layer", "stored_layers"]

FILE = "weights/quantised.safetensors"
"""The shard in a bundle."""

_PARTS = ("codes", "scales", "zeros", "order")
_CODES = {WeightKind.INT4: "U8", WeightKind.INT8: "I8", WeightKind.FP8: "F8_E4M3"}
_KINDS = {DTYPES[code][0]: kind for kind, code in _CODES.items()}
_HEADER_BYTES = 512
"""Kept a layer: four entries of a header with names of up to 80 characters."""


@dataclass(frozen=True)
class StoredLinear:
    """Where a quantised layer lies.

    Attributes:
        kind: int4, int8 or fp8.
        shape: (in, out).
        codes: See the module.
        scales: [blocks, out].
        zeros: [blocks, out]; None where all are 0.
        order: [in]; None where inputs are in order.
    """

    kind: WeightKind
    shape: tuple[int, int]
    codes: TensorRef
    scales: TensorRef
    zeros: TensorRef | None = None
    order: TensorRef | None = None


class LayerWriter:
    """Writes a shard. Leaves no file behind when its block ends with an exception.

    Args:
        file: To write; must not exist.
        layers: How many there will be at most.
        scale_type: "float32", "float16" or "bfloat16": what graphs compute in.
    """

    def __init__(self, file: Path, *, layers: int, scale_type: str) -> None:
        self.file = file
        self._scale_type = TYPES[scale_type]
        self._start = 8 + _HEADER_BYTES * max(layers, 1)
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0
        self._stream: BinaryIO | None = None

    def __enter__(self) -> LayerWriter:  # noqa: PYI034 - typing.Self needs Python 3.11
        self._stream = self.file.open("xb")
        self._stream.seek(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None  # noqa: S101 - entered
        try:
            if kind is None:
                self._write_header(self._stream)
        finally:
            self._stream.close()
            if kind is not None:
                self.file.unlink(missing_ok=True)

    def add(self, name: str, linear: PackedLinear) -> StoredLinear:
        """Write a layer; it is on its way to the disk when this returns."""
        codes = nibbles(linear.codes) if linear.kind is WeightKind.INT4 else linear.codes
        shape = (linear.codes.shape[0], linear.codes.shape[1])
        packed = (shape[0], shape[1] // 2) if linear.kind is WeightKind.INT4 else shape
        return StoredLinear(
            linear.kind,
            shape,
            codes=self._tensor(f"{name}.codes", codes, _CODES[linear.kind], packed),
            scales=self._tensor(f"{name}.scales", self._scales(linear.scales), self._scale_type.safetensors),
            zeros=None if linear.zeros is None else self._tensor(f"{name}.zeros", linear.zeros, "I8"),
            order=None if linear.order is None else self._tensor(f"{name}.order", linear.order, "I64"),
        )

    def _scales(self, scales: NDArray[np.float32]) -> NDArray[Any]:
        if self._scale_type.name == "bfloat16":
            import ml_dtypes

            return scales.astype(ml_dtypes.bfloat16)
        return scales.astype(self._scale_type.name)

    def _tensor(
        self, name: str, values: NDArray[Any], kind: str | None, shape: tuple[int, ...] | None = None
    ) -> TensorRef:
        assert self._stream is not None and kind is not None  # noqa: PT018, S101 - entered; a type of the format
        shape = shape or values.shape
        data = np.ascontiguousarray(values)
        self._stream.write(data.view(np.uint8).data)
        first, self._end = self._end, self._end + data.nbytes
        self._entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [first, self._end]}
        return TensorRef(name, self.file, self._start + first, data.nbytes, DTYPES[kind][0], tuple(shape))

    def _write_header(self, stream: BinaryIO) -> None:
        text = json.dumps(self._entries, separators=(",", ":")).encode()
        room = self._start - 8
        if len(text) > room:
            raise ValueError(f"header of {len(text)} bytes, {room} kept for it")
        stream.seek(0)
        stream.write(struct.pack("<Q", room) + text.ljust(room))
        stream.flush()


def stored_layers(shards: Iterable[Path]) -> dict[str, StoredLinear]:
    """Every quantised layer of a bundle's own shards, by name. Only headers are read.

    Raises:
        UserError: A shard is broken, or a layer's tensors do not fit together.
    """
    refs: dict[str, dict[str, TensorRef]] = {}
    for file in shards:
        for ref in read_shard(file):
            layer, _, part = ref.name.rpartition(".")
            if part not in _PARTS:
                raise UserError(f"{file} holds tensor {ref.name}, which is no part of a layer", hint=_HINT)
            refs.setdefault(layer, {})[part] = ref
    return {name: _stored(name, parts) for name, parts in refs.items()}


def bundle_layers(bundle: Bundle) -> dict[str, StoredLinear]:
    """Every quantised layer of a bundle by the name of its weight; none where it stores them as they were.

    Raises:
        UserError: See `stored_layers`; or the bundle has not the shard its manifest speaks of.
    """
    numerics = bundle.manifest.numerics
    if numerics is None or numerics.weights is None:
        return {}
    file = bundle.file(FILE)
    if not file.is_file():
        raise UserError(f"bundle file {FILE} is missing", hint=_HINT)
    return stored_layers([file])


def read_layer(stored: StoredLinear) -> PackedLinear:
    """Read one layer back."""
    codes = read_tensor(stored.codes)
    if stored.kind is WeightKind.INT4:
        codes = unpack_nibbles(codes.reshape(-1), stored.shape)
    return PackedLinear(
        stored.kind,
        codes,
        read_tensor(stored.scales).astype(np.float32),
        None if stored.zeros is None else read_tensor(stored.zeros),
        None if stored.order is None else read_tensor(stored.order),
    )


_HINT = "build the bundle again, or copy it again whole"


def _stored(name: str, parts: Mapping[str, TensorRef]) -> StoredLinear:
    if "codes" not in parts or "scales" not in parts or len(parts["codes"].shape) != 2:
        raise UserError(f"layer {name} has {', '.join(sorted(parts))}, expected codes and scales", hint=_HINT)
    codes, scales = parts["codes"], parts["scales"]
    kind = _KINDS.get(codes.dtype)
    if kind is None:
        raise UserError(f"layer {name} has codes of type {codes.dtype}", hint=_HINT)
    inputs, columns = codes.shape
    outputs = 2 * columns if kind is WeightKind.INT4 else columns
    blocks = scales.shape[0] if len(scales.shape) == 2 else 0
    zeros, order = parts.get("zeros"), parts.get("order")
    fits = (
        blocks
        and not inputs % blocks
        and scales.shape == (blocks, outputs)
        and (zeros is None or (zeros.shape == scales.shape and zeros.dtype == "int8"))
        and (order is None or (order.shape == (inputs,) and order.dtype == "int64"))
    )
    if not fits:
        raise UserError(f"the tensors of layer {name} do not fit together", hint=_HINT)
    return StoredLinear(kind, (inputs, outputs), codes, scales, zeros, order)

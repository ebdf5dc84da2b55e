"""Memory that ONNX Runtime's runs read and write in place, bound by address."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.runtime.base import Buffer, Feed, Value
from ep_export.runtime.bfloat16 import narrow, widen

__all__ = ["OrtBuffer", "OrtRows"]

_HOST = "cpu"
_TYPES: dict[str, tuple[int, Any]] = {  # TensorProto.DataType, and how the bytes are seen on the host
    "tensor(float)": (1, np.float32),
    "tensor(float16)": (10, np.float16),
    "tensor(bfloat16)": (16, np.uint16),
}


@dataclass(frozen=True)
class OrtRows(Value):
    """Consecutive entries of a buffer's first axis.

    Attributes:
        buffer: Whose memory it is.
        start: The first.
        stop: Behind the last.
    """

    buffer: OrtBuffer
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[stop - start, ...]."""
        return (self.stop - self.start, *self.buffer.shape[1:])

    @property
    def binding(self) -> tuple[Any, ...]:
        """What ONNX Runtime binds, behind a name."""
        buffer = self.buffer
        address = buffer.value.data_ptr() + self.start * buffer.entry_bytes
        return buffer.device, 0, buffer.onnx_type, self.shape, address

    def numpy(self) -> NDArray[Any]:
        """Its values, copied."""
        return self.buffer.read(self.start, self.stop)


class OrtBuffer(Buffer):
    """An OrtValue that stays where it is.

    Attributes:
        value: The OrtValue.
        device: ONNX Runtime's name of where it lies.
        onnx_type: Of its elements.
        entry_bytes: Of one entry of the first axis.
    """

    def __init__(self, value: Any, device: str, kind: str) -> None:
        self.value, self.device = value, device
        self.onnx_type, self._dtype = _TYPES[kind]
        self._shape = tuple(value.shape())
        self.entry_bytes = value.tensor_size_in_bytes() // self._shape[0]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], kind: str, device: str) -> OrtBuffer:
        """New memory; on the host, pages that nobody writes to cost nothing.

        Args:
            shape: Its shape.
            kind: ONNX Runtime's name of the type: `tensor(float)`.
            device: Where.
        """
        import onnxruntime

        onnx_type, dtype = _TYPES[kind]
        make = onnxruntime.OrtValue
        if onnx_type != _TYPES["tensor(bfloat16)"][0]:
            return cls(make.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0), device, kind)
        # from NumPy, bfloat16 gets to the host alone
        return cls(make.ortvalue_from_shape_and_type(shape, onnx_type, device, 0), device, kind)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self._shape

    def numpy(self) -> NDArray[Any]:
        """Its values, copied."""
        return self.read(0, self._shape[0])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Values of consecutive entries of the first axis, copied."""
        if self.device != _HOST:
            whole: NDArray[Any] = self.value.numpy()
            return whole[start:stop]
        array = self._host()[start:stop].copy()
        return widen(array).reshape(array.shape) if self._dtype is np.uint16 else array

    def rows(self, start: int, stop: int) -> OrtRows:
        """See `Buffer.rows`."""
        return OrtRows(self, start, stop)

    def write(self, row: int, values: Feed) -> None:
        """See `Buffer.write`; on a GPU everything goes to the host and back, once a request."""
        (array,) = values if isinstance(values, np.ndarray) else values.numpy()
        bits = narrow(array).reshape(array.shape) if self._dtype is np.uint16 else array
        if self.device == _HOST:
            self._host()[row, :, : array.shape[1]] = bits
        else:
            whole = self.value.numpy()
            whole[row, :, : array.shape[1]] = bits
            self.value.update_inplace(whole)

    def _host(self) -> NDArray[Any]:
        """The memory itself."""
        raw = (ctypes.c_char * (self.entry_bytes * self._shape[0])).from_address(self.value.data_ptr())
        return np.frombuffer(raw, dtype=self._dtype).reshape(self._shape)

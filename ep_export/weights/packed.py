"""The one form of a quantised linear layer, whatever it was read or rounded from.

A linear layer y = x W, W [in, out], is stored as small codes with one scale a block of inputs and an output:
w = (code - zero) scale. Codes of 4 bits are signed, -8 to 7, so that `zero` is what a symmetric layer has 0
of. Everything here is NumPy; sizes are checked, values are not trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.numerics import WeightKind

__all__ = ["PackedLinear", "nibbles", "unpack_nibbles"]


@dataclass(frozen=True)
class PackedLinear:
    """One quantised linear layer.

    Attributes:
        kind: int4, int8 or fp8.
        codes: [in, out]; int8 for int4 (-8 to 7) and int8, uint8 with the bits of float8_e4m3fn for fp8.
        scales: [blocks, out] float32 that float16 or bfloat16 holds exactly; inputs divided evenly among
            blocks.
        zeros: [blocks, out] int8, subtracted from the codes; None where all are 0.
        order: [in] int64: row i of `codes` belongs to input `order[i]`; None where that is i.
    """

    kind: WeightKind
    codes: NDArray[Any]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int8] | None = None
    order: NDArray[np.int64] | None = None

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return int(self.codes.shape[0] // self.scales.shape[0])

    def dequantised(self, dtype: type[np.floating] = np.float32) -> NDArray[np.floating]:
        """W [in, out], each value rounded once to `dtype`, rows in the layer's own order of inputs."""
        codes = _float8(self.codes) if self.kind is WeightKind.FP8 else self.codes.astype(np.float32)
        blocks = codes.reshape(self.scales.shape[0], self.group, -1)
        if self.zeros is not None:
            blocks = blocks - self.zeros[:, None].astype(np.float32)
        # a code has at most 8 bits and a scale 11 (float16) or 8 (bfloat16): float32 holds their product
        exact = (blocks * self.scales[:, None]).reshape(codes.shape)
        if self.order is None:
            return exact.astype(dtype)
        rows = np.empty_like(exact)
        rows[self.order] = exact
        return rows.astype(dtype)


def nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two codes of 4 bits a byte, the first in the low half, row-major: the layout of ONNX's INT4.

    Args:
        codes: -8 to 7, an even number of them.
    """
    flat = np.bitwise_and(codes.reshape(-1).view(np.uint8), np.uint8(15))
    return np.bitwise_or(flat[0::2], np.left_shift(flat[1::2], np.uint8(4)))


def unpack_nibbles(packed: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.int8]:
    """The inverse of `nibbles`."""
    flat = np.empty(packed.size * 2, dtype=np.int8)
    flat[0::2] = np.left_shift(packed, 4).view(np.int8) >> 4
    flat[1::2] = packed.view(np.int8) >> 4
    return flat.reshape(shape)


def _float8(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float8_e4m3fn as float32."""
    import ml_dtypes

    values: NDArray[np.float32] = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values

"""bfloat16 on the host, where NumPy has no such type: the upper 16 bits of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["narrow", "widen"]


def narrow(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Round to bfloat16, ties to even, NaN kept; the bits as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # rounding a NaN up could carry into infinity
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

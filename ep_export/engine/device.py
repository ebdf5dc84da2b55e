"""The GPU of this machine, asked through the driver's own library: no package is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

__all__ = ["Gpu", "find_gpu"]

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first GPU.

    Attributes:
        name: As the driver names it.
        sm: Compute capability, e.g. "8.7".
        memory_bytes: All its memory; on a Jetson the module's.
    """

    name: str
    sm: str
    memory_bytes: int


def find_gpu() -> Gpu | None:
    """The first GPU the driver shows, None without a driver or a GPU."""
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        or driver.cuDeviceGetName(name, _NAME_BYTES, device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    if failed:
        return None
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)

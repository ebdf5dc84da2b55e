"""Memory of a GPU for the runners that need raw addresses: CUDA through `cuda-python`, no torch.

Everything of one session happens on one stream, so a block can be given to the next taker while a kernel
still reads it: the next write waits in the same stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from ep_export.errors import UserError

__all__ = ["Block", "CudaDevice", "Device", "DeviceMemory"]

_ALIGNMENT = 512  # what cudaMalloc itself aligns to, at least 256
_STEPS = (
    8  # block sizes between two powers of two: a cache that grows by a token keeps its block's size for long
)
_INSTEAD = "the bundle runs without a GPU too: leave out --runtime, or give --runtime onnxruntime"


class Device(Protocol):
    """One GPU and one stream of it.

    Attributes:
        sm: Compute capability, e.g. "8.9".
        stream: Handle of the stream.
    """

    sm: str
    stream: int

    def allocate(self, size: int) -> int:
        """Address of `size` new bytes.

        Raises:
            MemoryError: There are not that many.
        """
        ...

    def free(self, address: int) -> None:
        """Give an allocation back, when the device is done with it."""
        ...

    def copy_in(self, address: int, values: NDArray[Any]) -> None:
        """Host to device; the host's memory may change afterwards."""
        ...

    def copy_out(self, values: NDArray[Any], address: int) -> None:
        """Device to host, after everything before it on the stream."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Device to device."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Make bytes on the device zero."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            UserError: Something on it failed.
        """
        ...

    def close(self) -> None:
        """Give the stream back."""
        ...


class CudaDevice:
    """The first CUDA GPU that is visible (`CUDA_VISIBLE_DEVICES` chooses)."""

    def __init__(self) -> None:
        """Open it.

        Raises:
            UserError: `cuda-python` is not installed, or there is no GPU; says what runs without one.
        """
        self._cuda = _cuda()
        error, count = self._cuda.cudaGetDeviceCount()
        if error != self._cuda.cudaError_t.cudaSuccess or not count:
            reason = self._reason(error) if error else "none is visible"
            raise UserError(f"TensorRT needs a CUDA GPU: {reason}", hint=_INSTEAD)
        attributes = self._cuda.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", attribute, 0)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.sm = f"{major}.{minor}"
        self.stream = int(self._call("cudaStreamCreate"))

    def allocate(self, size: int) -> int:
        """See `Device.allocate`."""
        error, address = self._cuda.cudaMalloc(size)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise MemoryError(size)
        self._check(error, "cudaMalloc")
        return int(address)

    def free(self, address: int) -> None:
        """See `Device.free`."""
        self._call("cudaFree", address)

    def copy_in(self, address: int, values: NDArray[Any]) -> None:
        """See `Device.copy_in`."""
        # From pageable memory the call returns once the bytes have left it.
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, values.ctypes.data, values.nbytes, kind, self.stream)

    def copy_out(self, values: NDArray[Any], address: int) -> None:
        """See `Device.copy_out`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", values.ctypes.data, address, values.nbytes, kind, self.stream)
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """See `Device.copy`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def clear(self, address: int, size: int) -> None:
        """See `Device.clear`."""
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """See `Device.close`."""
        self._call("cudaStreamDestroy", self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        self._check(error, name)
        return results[0] if results else None

    def _check(self, error: Any, what: str) -> None:
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise UserError(
                f"{what} failed: {self._reason(error)}", hint="see what else uses the GPU: nvidia-smi"
            )

    def _reason(self, error: Any) -> str:
        text = self._cuda.cudaGetErrorString(error)[1]
        return text.decode() if isinstance(text, bytes) else str(text)


class Block:
    """Bytes on the device; they go back to their memory when the last holder lets go."""

    def __init__(self, address: int, size: int, give_back: Callable[[int, int], None]) -> None:
        self.address, self.size = address, size
        self._give_back = give_back

    def __del__(self) -> None:
        self._give_back(self.address, self.size)


class DeviceMemory:
    """Blocks of one device, given out again when they come back.

    What is idle stays small: before more is allocated, idle blocks are freed if they are more than half of
    what is in use.

    Args:
        device: Where.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._idle: list[tuple[int, int]] = []  # (size, address), by size
        self._used = 0
        self._open = True

    @property
    def idle_bytes(self) -> int:
        """Allocated and in nobody's hands."""
        return sum(size for size, _ in self._idle)

    @property
    def used_bytes(self) -> int:
        """In somebody's hands."""
        return self._used

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes; never of none, since an address is always needed.

        Raises:
            UserError: The GPU's memory is full.
        """
        size = _rounded(size)
        fitting = next((entry for entry in self._idle if size <= entry[0] <= 2 * size), None)
        if fitting is not None:
            self._idle.remove(fitting)
            size, address = fitting
        else:
            address = self._allocate(size)
        self._used += size
        return Block(address, size, self._take_back)

    def close(self) -> None:
        """Free everything idle, and later what is still held, as it comes back."""
        self._open = False
        self._free_idle()
        if not self._used:
            self.device.close()

    def _allocate(self, size: int) -> int:
        if self.idle_bytes > self._used // 2:
            self._free_idle()
        try:
            return self.device.allocate(size)
        except MemoryError:
            self._free_idle()
        try:
            return self.device.allocate(size)
        except MemoryError as error:
            raise UserError(
                f"the GPU has no {size / 1e6:.1f} MB left; this session holds {self._used / 1e6:.1f} MB",
                hint="close what else uses the GPU, or ask with a smaller picture",
            ) from error

    def _take_back(self, address: int, size: int) -> None:
        self._used -= size
        if self._open:
            self._idle.append((size, address))
            self._idle.sort()
            return
        self.device.free(address)
        if not self._used:
            self.device.close()

    def _free_idle(self) -> None:
        for _, address in self._idle:
            self.device.free(address)
        self._idle.clear()


def _rounded(size: int) -> int:
    step = max(_ALIGNMENT, 1 << max(0, size.bit_length() - _STEPS.bit_length()))
    return max(1, -(-size // step)) * step


def _cuda() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UserError(
            f"TensorRT needs cuda-python for its buffers: {error}",
            hint=f"pip install 'ep-export[tensorrt]'; {_INSTEAD}",
        ) from error
    return runtime

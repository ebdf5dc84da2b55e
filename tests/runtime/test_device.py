"""Memory of a GPU and the calls to CUDA: `HostDevice` and a written-down cuda-python in place of both.

The last tests use the real cuda-python as far as it goes on a machine without a GPU.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from host_device import HostDevice

from ep_export.errors import UserError
from ep_export.runtime.device import CudaDevice, DeviceMemory


def test_blocks_are_used_again_and_idle_ones_stay_few():
    device = HostDevice()
    memory = DeviceMemory(device)
    kept = memory.take(100_000)
    first = memory.take(5_000).address  # comes back at once
    assert memory.take(4_900).address == first
    for size in range(10_000, 200_000, 7_000):
        memory.take(size)
    assert memory.idle_bytes <= memory.used_bytes // 2 + 200_000
    del kept
    memory.close()
    assert not device.held
    assert device.closed


def test_a_growing_cache_keeps_its_block_for_long():
    device = HostDevice()
    memory = DeviceMemory(device)
    sizes = {memory.take(1_300_000 + step * 1_024).size for step in range(128)}
    assert len(sizes) <= 3
    assert max(sizes) <= 1.15 * (1_300_000 + 128 * 1_024)


def test_full_memory_is_one_line():
    device = HostDevice(capacity=1 << 20)
    memory = DeviceMemory(device)
    held = memory.take(500_000)
    memory.take(200_000)  # comes back, and is freed to make room for the next
    memory.take(450_000)
    with pytest.raises(UserError, match=r"the GPU has no 0\.7 MB left") as caught:
        memory.take(700_000)
    assert "smaller picture" in caught.value.hint
    del held


class FakeCudart:
    """cuda-python's runtime as far as `CudaDevice` calls it: every call is written down. No GPU behind it."""

    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorMemoryAllocation=2)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")

    def __init__(self, count=(0, 1), malloc=(0, 4096)):
        self.calls = []
        self.results = {
            "cudaGetDeviceCount": count,
            "cudaMalloc": malloc,
            "cudaStreamCreate": (0, 7),
            "cudaGetErrorString": (0, b"no CUDA-capable device is detected"),
        }

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if name == "cudaDeviceGetAttribute":
                return 0, {"major": 8, "minor": 7}[arguments[0]]
            return self.results.get(name, (0,))

        return call


@pytest.fixture
def cudart(monkeypatch):
    def install(**results):
        fake = FakeCudart(**results)
        monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=SimpleNamespace(runtime=fake)))
        monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=fake))
        return fake

    return install


def test_the_cuda_device_makes_these_calls(cudart):
    fake = cudart()
    device = CudaDevice()
    assert (device.sm, device.stream) == ("8.7", 7)
    values = np.arange(4, dtype=np.float32)
    address = device.allocate(16)
    device.copy_in(address, values)
    device.copy_out(values, address)
    device.free(address)
    device.close()
    host = values.ctypes.data
    assert fake.calls[-6:] == [
        ("cudaMalloc", 16),
        ("cudaMemcpyAsync", 4096, host, 16, "in", 7),
        ("cudaMemcpyAsync", host, 4096, 16, "out", 7),
        ("cudaStreamSynchronize", 7),
        ("cudaFree", 4096),
        ("cudaStreamDestroy", 7),
    ]


@pytest.mark.parametrize("count", [(100, None), (0, 0)], ids=["error", "none visible"])
def test_without_a_gpu_one_line_says_what_runs_instead(cudart, count):
    cudart(count=count)
    with pytest.raises(UserError, match="TensorRT needs a CUDA GPU: n") as caught:
        CudaDevice()
    assert "\n" not in str(caught.value)
    assert "--runtime onnxruntime" in caught.value.hint


def test_cuda_errors_are_told(cudart):
    fake = cudart(malloc=(2, None))
    device = CudaDevice()
    with pytest.raises(MemoryError):
        device.allocate(16)
    fake.results["cudaStreamSynchronize"] = (700,)
    with pytest.raises(UserError, match=r"cudaStreamSynchronize failed: no CUDA-capable"):
        device.synchronize()


def test_without_cuda_python_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UserError, match="needs cuda-python") as caught:
        CudaDevice()
    assert "ep-export[tensorrt]" in caught.value.hint


def test_real_cuda_python_says_that_there_is_no_gpu():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    if runtime.cudaGetDeviceCount()[1]:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="TensorRT needs a CUDA GPU: "):
        CudaDevice()

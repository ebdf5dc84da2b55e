"""The TensorRT runner and the real TensorRT-RTX, as far as it goes on a machine without a GPU."""

import importlib

import pytest
from host_device import HostDevice
from test_onnxruntime_runner import joined

from ep_export.engine.device import find_gpu
from ep_export.engine_record import Limits
from ep_export.errors import UserError
from ep_export.runtime.device import DeviceMemory
from ep_export.runtime.tensorrt_runner import DTYPES, _allocator, _log, open_engine

onnx = importlib.import_module("onnx")
LIMITS = Limits(max_prompt=512, max_new_tokens=64, max_pixels=1 << 20, max_kept_tokens=512)


@pytest.fixture(scope="module")
def real_engine(tmp_path_factory):
    """past, new -> present, compiled by the real TensorRT-RTX for SM 8.9 without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    directory = tmp_path_factory.mktemp("rtx")
    onnx_file = joined(directory / "joined.onnx", onnx.TensorProto.FLOAT)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse(onnx_file.read_bytes())
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile.set_shape("past", (1, 0), (1, 4), (1, 8))
    profile.set_shape("new", (1, 1), (1, 2), (1, 4))
    config.add_optimization_profile(profile)
    (directory / "joined.engine").write_bytes(bytes(builder.build_serialized_network(network, config)))
    return trt, directory / "joined.engine"


def test_real_tensorrt_rtx_has_every_call_the_runner_makes(real_engine):
    """`fake_tensorrt` was written from this interface: here it is asked of the library itself."""
    trt, _ = real_engine
    calls = {
        trt.Runtime: ("deserialize_cuda_engine", "get_engine_validity", "engine_header_size"),
        trt.ICudaEngine: (
            "create_execution_context",
            "get_aliased_input_tensor",
            "get_device_memory_size_for_profile_v2",
            "get_tensor_dtype",
            "get_tensor_location",
            "get_tensor_mode",
            "get_tensor_name",
            "num_io_tensors",
            "num_optimization_profiles",
        ),
        trt.IExecutionContext: (
            "execute_async_v3",
            "get_tensor_shape",
            "infer_shapes",
            "set_device_memory",
            "set_input_shape",
            "set_optimization_profile_async",
            "set_output_allocator",
            "set_tensor_address",
        ),
    }
    assert [(k, name) for k, names in calls.items() for name in names if not hasattr(k, name)] == []
    assert set(DTYPES) <= set(trt.DataType.__members__)
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__
    assert isinstance(_log(trt).logger, trt.ILogger)
    assert isinstance(_allocator(trt, DeviceMemory(HostDevice()), "FLOAT"), trt.IOutputAllocator)


def test_real_tensorrt_rtx_recognises_what_is_no_engine(real_engine, tmp_path):
    trt, _ = real_engine
    (tmp_path / "text.engine").write_bytes(b"x" * 4096)
    with pytest.raises(UserError, match=r"text\.engine cannot be opened: .*malformed engine"):
        open_engine(trt, tmp_path / "text.engine", name="text", profiles=(), limits=LIMITS)


def test_real_tensorrt_rtx_without_a_gpu_gives_its_reason_in_one_line(real_engine):
    trt, file = real_engine
    if find_gpu() is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"^engine .*joined\.engine cannot be opened: .*CUDA") as caught:
        open_engine(trt, file, name="joined", profiles=(), limits=LIMITS)
    assert "\n" not in str(caught.value)

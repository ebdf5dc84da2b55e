"""Stand-ins for a GPU and for TensorRT, so that everything but their own calls is tested without them.

`HostDevice` is the device contract in this machine's memory. `fake_tensorrt` is a module with the part of
TensorRT's interface that the runner uses, whose "engines" are ONNX files: a context reads inputs from their
addresses, runs ONNX Runtime and writes to the outputs' addresses. Shapes of outputs are what the graph's own
names of axes say of the inputs' shapes, or what a plugin's shape function says; where neither does they are
open, and the runner has to wait for them. As TensorRT does, it refuses caches written in place whose capacity
is open or whose output is bound elsewhere. No CUDA and no TensorRT is exercised by it.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir

from ep_export.runtime import OnnxRuntimeRunner
from ep_export.runtime.bfloat16 import narrow, widen

__all__ = ["HostDevice", "fake_tensorrt", "write_fake_engine"]

_KINDS = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT64": "INT64"}
_ALIGNMENT = 256  # of cudaMalloc, and of what TensorRT takes
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64}


class HostDevice:
    """The device contract in host memory; counts what it is asked for."""

    def __init__(self, sm="8.9", capacity=1 << 40):
        self.sm, self.stream, self.capacity = sm, 7, capacity
        self.held, self.copies_in, self.copies_out, self.closed = {}, 0, 0, False
        self.copies_within = 0

    def allocate(self, size):
        if sum(len(b) - _ALIGNMENT for b in self.held.values()) + size > self.capacity:
            raise MemoryError(size)
        buffer = ctypes.create_string_buffer(b"\xff" * (size + _ALIGNMENT))  # not what one would like to find
        address = -(-ctypes.addressof(buffer) // _ALIGNMENT) * _ALIGNMENT
        self.held[address] = buffer
        return address

    def free(self, address):
        del self.held[address]

    def copy_in(self, address, values):
        self.copies_in += 1
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def copy_out(self, values, address):
        self.copies_out += 1
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def copy(self, target, source, size):
        self.copies_within += 1
        ctypes.memmove(target, source, size)

    def clear(self, address, size):
        ctypes.memset(address, 0, size)

    def synchronize(self):
        assert not self.closed

    def close(self):
        assert not self.closed
        self.closed = True


class _Severity(Enum):
    INTERNAL_ERROR, ERROR, INFO = range(3)


class _Logger:
    Severity = _Severity


class _Mode(Enum):
    INPUT, OUTPUT = range(2)


class _Location(Enum):
    DEVICE, HOST = range(2)


class _Context:
    def __init__(self, engine):
        self.engine, self.profile = engine, None
        self.shapes, self.addresses, self.scratch, self.told = {}, {}, None, {}

    def set_optimization_profile_async(self, number, stream):
        assert stream == 7
        self.profile = number
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        assert address
        if address % _ALIGNMENT:
            return False
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name, allocator):
        self.addresses[name] = allocator
        return True

    def set_device_memory(self, address, size):
        assert size >= self.engine.scratch[self.profile]
        self.scratch = (address, size)

    def infer_shapes(self):
        return sorted(set(self.engine.inputs) - set(self.shapes))

    def get_tensor_shape(self, name):
        """From the inputs' shapes; -1 where those do not tell. What is told here must then be written."""
        if self.engine.shape_function is not None:
            shapes = self.engine.shape_function([self.shapes[name] for name in self.engine.inputs])
            self.told[name] = shapes[list(self.engine.outputs).index(name)]
            return self.told[name]
        symbols = {
            str(dim): size
            for input_name, value in self.engine.inputs.items()
            for dim, size in zip(value.shape, self.shapes[input_name], strict=True)
        }
        shape = tuple(_size(dim, symbols) for dim in self.engine.outputs[name].shape)
        if -1 not in shape:
            self.told[name] = shape
        return shape

    def execute_async_v3(self, stream):
        assert stream == 7
        assert self.scratch is not None
        if self.engine.fails:
            if self.engine.fails is not True:
                self.engine.logger.log(_Severity.ERROR, self.engine.fails)
            return False
        for output, name in self.engine.aliases.items():
            if self.addresses[output] != self.addresses[name]:
                self.engine.logger.log(_Severity.ERROR, f"{output} and {name} share no memory")
                return False
        feeds = {name: self._read(name) for name in self.engine.inputs}
        for name, value in self.engine.runner.run(feeds).items():
            self._write(name, value.numpy())
        return True

    def _read(self, name):
        kind = self.engine.kind(name)
        values = np.empty(self.shapes[name], dtype=_NUMPY[kind])
        ctypes.memmove(values.ctypes.data, self.addresses[name], values.nbytes)
        return widen(values) if kind == "BF16" else values

    def _write(self, name, array):
        bits = narrow(array) if self.engine.kind(name) == "BF16" else np.ascontiguousarray(array)
        address = self.addresses[name]
        if isinstance(address, int):
            assert bits.shape == self.told[name], "more or less is written than memory was asked for"
        else:
            address.notify_shape(name, bits.shape)
            address = address.reallocate_output(name, 0, bits.nbytes, 512)
        ctypes.memmove(address, bits.ctypes.data, bits.nbytes)


def _size(dim, symbols):
    if isinstance(dim, int):
        return dim
    parts = str(dim).split(" + ")
    return sum(symbols[part] for part in parts) if set(parts) <= set(symbols) else -1


def _aliases(graph):
    """Output -> input of caches that are written in place."""
    scattered = [node for node in graph if node.op_type == "TensorScatter"]
    for node in scattered:
        assert isinstance(node.inputs[0].shape[2], int), "a cache has a static capacity in TensorRT"
    return {node.outputs[0].name: node.inputs[0].name for node in scattered}


class _Engine:
    def __init__(self, file, settings, logger):
        file = Path(file)
        graph = ir.load(file).graph
        self.aliases = _aliases(graph)
        self.inputs = {value.name: value for value in graph.inputs}
        self.outputs = {value.name: value for value in graph.outputs}
        self.runner = OnnxRuntimeRunner(file)
        self.logger, self.contexts = logger, []
        self.num_optimization_profiles = settings["profiles"]
        self.scratch = [100 + number for number in range(settings["profiles"])]
        self.fails = settings["fails"]
        self.unready = settings["unready"]
        takes = settings["shape_function"] is not None and settings["shape_function"](file.stem)
        self.shape_function = takes or None
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, number):
        return [*self.inputs, *self.outputs][number]

    def get_tensor_mode(self, name):
        return _Mode.INPUT if name in self.inputs else _Mode.OUTPUT

    def get_tensor_location(self, _name):
        return _Location.DEVICE

    def kind(self, name):
        return _KINDS[(self.inputs | self.outputs)[name].dtype.name]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.kind(name))

    def get_aliased_input_tensor(self, name):
        return self.aliases.get(name)

    def get_device_memory_size_for_profile_v2(self, number):
        return self.scratch[number]

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        if self.unready:
            return None
        self.contexts.append(_Context(self))
        return self.contexts[-1]


def fake_tensorrt(version="10.9.0.34", **settings):
    """A module in TensorRT's place.

    Args:
        version: Its `__version__`.
        settings: profiles: of decoder spans, all others have one. fails: what runs log before they fail, or
            True. refuses: what is logged of an engine that is not opened. unready: no execution context can
            be had. shape_function: name of a component -> its plugin's (shapes of inputs) -> shapes of
            outputs, or None.
    """
    chosen = {
        "profiles": 1,
        "fails": False,
        "refuses": "",
        "unready": False,
        "shape_function": None,
        **settings,
    }
    made = SimpleNamespace(engines={}, libraries=[], settings=chosen)

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, content):
            if chosen["refuses"]:
                self.logger.log(_Severity.ERROR, chosen["refuses"])
                return None
            file = bytes(content).decode()
            own = chosen if "decoder" in file else {**chosen, "profiles": 1}
            made.engines[file.rsplit("/", 1)[-1]] = engine = _Engine(file, own, self.logger)
            return engine

    registry = SimpleNamespace(load_library=made.libraries.append)
    return SimpleNamespace(
        __name__=f"fake_tensorrt_{id(made)}",
        __version__=version,
        made=made,
        ILogger=_Logger,
        IOutputAllocator=object,
        Runtime=Runtime,
        TensorIOMode=_Mode,
        TensorLocation=_Location,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        get_plugin_registry=lambda: registry,
    )


def write_fake_engine(onnx, engine):
    """An "engine" the fake module opens: the path of an ONNX file."""
    engine.write_bytes(str(onnx).encode())

"""A stand-in for a Triton server with its Python and ONNX Runtime backends.

It is not Triton: it reads the repository's config.pbtxt files, opens the ONNX models with ONNX Runtime,
checks every tensor against the configuration as Triton would, and gives model.py a module of the name and
shape it expects. Shared memory, scheduling, the network and GPUs are not shown.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
from google.protobuf import json_format
from triton_schema import parse_config

__all__ = ["Answer", "StandIn"]

_TYPES = {
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_STRING": np.object_,
}
_FINAL = 1


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        assert isinstance(values, np.ndarray)
        self._name, self._values = name, values.copy()  # through shared memory

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError:
    INTERNAL = 1
    INVALID_ARG = 3

    def __init__(self, message: str, code: int = 0) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


@dataclass
class Response:
    tensors: list[Tensor]
    failed: TritonError | None = None

    def has_error(self) -> bool:
        return self.failed is not None

    def error(self) -> TritonError | None:
        return self.failed

    def output_tensors(self) -> list[Tensor]:
        return self.tensors


@dataclass
class Answer:
    """What one request got back."""

    responses: list[Response] = field(default_factory=list)
    finished: bool = False
    leaves_after: int | None = None

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not self.finished, "nothing may be sent after the final flag"
        if response is not None:
            self.responses.append(response)
        self.finished = flags == _FINAL

    def is_cancelled(self) -> bool:
        return self.leaves_after is not None and len(self.responses) >= self.leaves_after

    @property
    def error(self) -> str:
        return self.responses[-1].failed.message() if self.responses[-1].failed else ""

    def outputs(self, number: int = -1) -> dict[str, Any]:
        return {t.name(): t.as_numpy() for t in self.responses[number].tensors}

    @property
    def pieces(self) -> list[str]:
        return [self.outputs(i)["text"][0].decode() for i in range(len(self.responses))]


@dataclass
class Request:
    inputs: dict[str, Tensor]
    answer: Answer

    def get_response_sender(self) -> Answer:
        return self.answer


class StandIn:
    """A server of the repository at `models`."""

    codes = TritonError

    def __init__(self, models: Path, front: str = "ep_export") -> None:
        self._models, self._front = models, front
        folders = sorted(folder for folder in models.iterdir() if folder.is_dir())
        self.configs = {
            folder.name: parse_config((folder / "config.pbtxt").read_text()) for folder in folders
        }
        self._sessions: dict[str, Any] = {}
        self.requests: list[tuple[str, dict[str, tuple[int, ...]]]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[StandIn]:
        """Load every model, as a server does before it answers."""
        for name, config in self.configs.items():
            assert config.name == name
            if config.backend == "onnxruntime":
                file = self._models / name / "1" / "model.onnx"
                self._sessions[name] = onnxruntime.InferenceSession(str(file))
        with mock.patch.dict(sys.modules, {"triton_python_backend_utils": self._module()}):
            file = self._models / self._front / "1" / "model.py"
            spec = importlib.util.spec_from_file_location("triton_front_model", file)
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
            self._model = loaded.TritonPythonModel()
            config = json_format.MessageToDict(self.configs[self._front], preserving_proto_field_name=True)
            self._model.initialize({"model_config": json.dumps(config), "model_version": "1"})
            yield self
            self._model.finalize()

    def ask(
        self, inputs: Mapping[str, np.ndarray], *, leaves_after: int | None = None, checked: bool = True
    ) -> Answer:
        """Send one request to the front model; unchecked, shapes reach it as no server would let them."""
        config = self.configs[self._front]
        needed = {port.name for port in config.input if not port.optional}
        known = {port.name: port for port in config.input}
        assert needed <= set(inputs) <= set(known)
        for name, values in inputs.items():
            if checked:
                _check(known[name], values)
        answer = Answer(leaves_after=leaves_after)
        tensors = {name: Tensor(name, values) for name, values in inputs.items()}
        self._model.execute([Request(tensors, answer)])
        assert answer.finished
        for response in answer.responses:
            if response.failed is None:
                ports = {port.name: port for port in config.output}
                assert {tensor.name() for tensor in response.tensors} == set(ports)
                for tensor in response.tensors:
                    _check(ports[tensor.name()], tensor.as_numpy())
        return answer

    def _infer(self, name: str, wanted: list[str], inputs: list[Tensor]) -> Response:
        if name not in self._sessions:
            return Response([], TritonError(f"unknown model {name}"))
        config = self.configs[name]
        given = {tensor.name(): tensor.as_numpy() for tensor in inputs}
        assert set(given) == {port.name for port in config.input}
        for port in config.input:
            _check(port, given[port.name])
        self.requests.append((name, {key: values.shape for key, values in given.items()}))
        made = self._sessions[name].run(wanted, given)
        ports = {port.name: port for port in config.output}
        for output, values in zip(wanted, made, strict=True):
            _check(ports[output], values)
        return Response([Tensor(output, values) for output, values in zip(wanted, made, strict=True)])

    def _module(self) -> types.ModuleType:
        server = self
        module = types.ModuleType("triton_python_backend_utils")

        class InferenceRequest:
            def __init__(self, *, model_name, requested_output_names, inputs, preferred_memory) -> None:
                assert preferred_memory == ("memory", "cpu", 0)
                self._call = (model_name, requested_output_names, inputs)

            def exec(self) -> Response:
                return server._infer(*self._call)

        module.Tensor = Tensor
        module.TritonError = TritonError
        module.InferenceRequest = InferenceRequest
        module.InferenceResponse = lambda output_tensors, error=None: Response(output_tensors, error)
        module.PreferredMemory = lambda kind, device: ("memory", kind, device)
        module.TRITONSERVER_MEMORY_CPU = "cpu"
        module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = _FINAL
        module.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
        return module


def _check(port: Any, values: np.ndarray) -> None:
    """What Triton checks before it runs a model: type, rank, fixed axes."""
    kind = type(port).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[port.data_type].name
    assert values.dtype == _TYPES[kind], (port.name, values.dtype)
    assert len(values.shape) == len(port.dims), (port.name, values.shape)
    for axis, size in zip(port.dims, values.shape, strict=True):
        assert axis in (-1, size), (port.name, values.shape)

"""A stand-in for a Triton server with its Python backend.

It is not Triton: it reads the repository's config.pbtxt, checks every tensor against it as Triton would, and
gives model.py a module of the name and shape it expects. What the backend refuses is refused: tensors that do
not fit the configuration, reading a request after `execute` has returned, a response after the final one, and
nothing sent that is not final. Shared memory, scheduling, the network and GPUs are not shown.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
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
    UNAVAILABLE = 4

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


class Answer:
    """What one request got back; its sender."""

    def __init__(self, leaves_after: int | None = None) -> None:
        self.responses: list[Response] = []
        self.finished = threading.Event()
        self._leaves_after = leaves_after

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not self.finished.is_set(), "nothing may be sent after the final flag"
        assert response is not None or flags == _FINAL, "a response that is not final must be one"
        if response is not None:
            self.responses.append(response)
        if flags == _FINAL:
            self.finished.set()

    def is_cancelled(self) -> bool:
        return self._leaves_after is not None and len(self.responses) >= self._leaves_after

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
    inputs: dict[str, Tensor] | None
    answer: Answer

    def get_response_sender(self) -> Answer:
        assert self.inputs is not None, "the request is gone"
        return self.answer


class StandIn:
    """A server of the repository at `models`."""

    codes = TritonError

    def __init__(self, models: Path, front: str = "ep_export", **parameters: str) -> None:
        """With other values of `parameters` in its configuration."""
        self._folder = models / front
        self.config = parse_config((self._folder / "config.pbtxt").read_text())
        for name, value in parameters.items():
            self.config.parameters[name].string_value = value

    @contextlib.contextmanager
    def running(self) -> Iterator[StandIn]:
        """Load the model, as a server does before it answers."""
        assert self.config.name == self._folder.name
        with mock.patch.dict(sys.modules, {"triton_python_backend_utils": self._module()}):
            spec = importlib.util.spec_from_file_location(
                "triton_front_model", self._folder / "1" / "model.py"
            )
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
            self._model = loaded.TritonPythonModel()
            config = json_format.MessageToDict(self.config, preserving_proto_field_name=True)
            told = {"model_config": json.dumps(config), "model_version": "1", "model_instance_kind": "CPU"}
            self._model.initialize(told)
            yield self
            self._model.finalize()

    def ask(
        self, inputs: Mapping[str, np.ndarray], *, leaves_after: int | None = None, checked: bool = True
    ) -> Answer:
        """Send one request; unchecked, shapes reach the model as no server would let them."""
        return self.ask_all([inputs], leaves_after=leaves_after, checked=checked)[0]

    def ask_all(
        self,
        asked: Sequence[Mapping[str, np.ndarray]],
        *,
        leaves_after: int | None = None,
        checked: bool = True,
    ) -> list[Answer]:
        """Send requests together and wait for the last response of each."""
        requests = [self._request(inputs, leaves_after, checked) for inputs in asked]
        answers = [request.answer for request in requests]
        self._model.execute(requests)
        for request in requests:
            request.inputs = None  # the backend's memory is another request's now
        for answer in answers:
            assert answer.finished.wait(60)
            for response in answer.responses:
                self._check_response(response)
        return answers

    def _request(self, inputs: Mapping[str, np.ndarray], leaves_after: int | None, checked: bool) -> Request:
        needed = {port.name for port in self.config.input if not port.optional}
        known = {port.name: port for port in self.config.input}
        assert needed <= set(inputs) <= set(known)
        for name, values in inputs.items():
            if checked:
                _check(known[name], values)
        return Request({name: Tensor(name, values) for name, values in inputs.items()}, Answer(leaves_after))

    def _check_response(self, response: Response) -> None:
        if response.failed is None:
            ports = {port.name: port for port in self.config.output}
            assert {tensor.name() for tensor in response.tensors} == set(ports)
            for tensor in response.tensors:
                _check(ports[tensor.name()], tensor.as_numpy())

    def _module(self) -> types.ModuleType:
        module = types.ModuleType("triton_python_backend_utils")
        module.Tensor = Tensor
        module.TritonError = TritonError
        module.InferenceResponse = lambda output_tensors, error=None: Response(output_tensors, error)
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

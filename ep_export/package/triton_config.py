"""`config.pbtxt`: what Triton is told about a model, as protobuf text.

Every axis that changes is -1 and there is no batch axis of Triton's (`max_batch_size: 0`): prompts differ in
length and the bundle's own batch is 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ep_export.bundle import Component, TensorSpec
from ep_export.errors import UserError

__all__ = ["INPUTS", "OUTPUTS", "Port", "component_config", "front_config"]

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}


@dataclass(frozen=True)
class Port:
    """One input or output of the model that people talk to.

    Attributes:
        name: Its name.
        type: Triton's name of its type.
        size: Elements; -1 for any number.
        optional: It may be left out.
    """

    name: str
    type: str
    size: int
    optional: bool = False


INPUTS = (
    Port("prompt", "TYPE_STRING", 1),
    Port("image", "TYPE_STRING", -1, optional=True),
    Port("frames", "TYPE_STRING", -1, optional=True),
    Port("fps", "TYPE_FP32", 1, optional=True),
    Port("max_new_tokens", "TYPE_INT32", 1, optional=True),
    Port("keep", "TYPE_FP32", 1, optional=True),
    Port("policy", "TYPE_STRING", -1, optional=True),
    Port("temperature", "TYPE_FP32", 1, optional=True),
    Port("top_p", "TYPE_FP32", 1, optional=True),
    Port("top_k", "TYPE_INT32", 1, optional=True),
    Port("seed", "TYPE_INT64", 1, optional=True),
    Port("stream", "TYPE_BOOL", 1, optional=True),
)
"""Of the model `ep_export`; README.md of the repository says what each means."""

OUTPUTS = (
    Port("text", "TYPE_STRING", 1),
    Port("token_ids", "TYPE_INT64", -1),
    Port("kept_index", "TYPE_INT64", -1),
    Port("finish_reason", "TYPE_STRING", 1),
)


def component_config(name: str, component: Component, *, gpu: bool) -> str:
    """Of a component that Triton runs with its ONNX Runtime backend.

    Args:
        name: The model's.
        component: From the manifest.
        gpu: Run it with the CUDA execution provider.

    Raises:
        UserError: A tensor has a type that Triton's Python backend cannot hand on.
    """
    lines = [
        f"name: {_text(name)}",
        'backend: "onnxruntime"',
        "max_batch_size: 0",
        *_ports("input", (_port(component, spec) for spec in component.inputs)),
        *_ports("output", (_port(component, spec) for spec in component.outputs)),
        *_instances("KIND_GPU" if gpu else "KIND_CPU"),
    ]
    return "\n".join(lines) + "\n"


def front_config(name: str, parameters: Mapping[str, str]) -> str:
    """Of the model that takes a question and pictures and streams the answer.

    It is decoupled: one request may have many responses.

    Args:
        name: The model's.
        parameters: What the model reads when it is loaded.
    """
    lines = [
        f"name: {_text(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        *_ports("input", map(_front_port, INPUTS)),
        *_ports("output", map(_front_port, OUTPUTS)),
        "model_transaction_policy {",
        "  decoupled: true",
        "}",
        *_instances("KIND_CPU"),
    ]
    for key, value in parameters.items():
        lines += ["parameters {", f"  key: {_text(key)}", f"  value {{ string_value: {_text(value)} }}", "}"]
    return "\n".join(lines) + "\n"


def _port(component: Component, spec: TensorSpec) -> list[str]:
    if spec.dtype not in _TYPES:
        raise UserError(
            f"{component.name} has {spec.dtype} tensors, which Triton's Python backend hands on only through "
            "DLPack",
            hint="export with --precision fp16 or fp32",
        )
    dims = ", ".join(str(axis) if isinstance(axis, int) else "-1" for axis in spec.shape)
    return [f"name: {_text(spec.name)}", f"data_type: {_TYPES[spec.dtype]}", f"dims: [ {dims} ]"]


def _front_port(port: Port) -> list[str]:
    lines = [f"name: {_text(port.name)}", f"data_type: {port.type}", f"dims: [ {port.size} ]"]
    return [*lines, "optional: true"] if port.optional else lines


def _ports(kind: str, ports: Iterable[list[str]]) -> list[str]:
    lines = []
    for port in ports:
        lines += [f"{kind} {{", *(f"  {line}" for line in port), "}"]
    return lines


def _instances(kind: str) -> list[str]:
    return ["instance_group {", "  count: 1", f"  kind: {kind}", "}"]


def _text(value: str) -> str:
    """A protobuf text string: JSON's escapes are among those it knows."""
    return json.dumps(value)

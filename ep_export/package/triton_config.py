"""`config.pbtxt`: what Triton is told about the model, as protobuf text.

There is no batch axis of Triton's (`max_batch_size: 0`): requests differ in everything, and the model batches
them itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["INPUTS", "OUTPUTS", "Port", "front_config"]


@dataclass(frozen=True)
class Port:
    """One input or output of the model.

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
"""README.md of the repository says what each means."""

OUTPUTS = (
    Port("text", "TYPE_STRING", 1),
    Port("token_ids", "TYPE_INT64", -1),
    Port("kept_index", "TYPE_INT64", -1),
    Port("finish_reason", "TYPE_STRING", 1),
)


def front_config(name: str, parameters: Mapping[str, str], *, gpu: bool) -> str:
    """Of the model that takes a question and pictures and streams the answer.

    It is decoupled: one request may have many responses.

    Args:
        name: The model's.
        parameters: What the model reads when it is loaded.
        gpu: Every instance belongs to a GPU, which Triton tells it.
    """
    lines = [
        f"name: {_text(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        *_ports("input", map(_port, INPUTS)),
        *_ports("output", map(_port, OUTPUTS)),
        "model_transaction_policy {",
        "  decoupled: true",
        "}",
        *_instances("KIND_GPU" if gpu else "KIND_CPU"),
    ]
    for key, value in parameters.items():
        lines += ["parameters {", f"  key: {_text(key)}", f"  value {{ string_value: {_text(value)} }}", "}"]
    return "\n".join(lines) + "\n"


def _port(port: Port) -> list[str]:
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

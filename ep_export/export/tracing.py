"""A recorded module is written into a graph: every call becomes its ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ep_export.export.graph_builder import GraphBuilder, Tensor
from ep_export.export.operators import OPERATORS
from ep_export.export.recording import Call, Constant, Operand, Stored, record

__all__ = ["trace"]


def trace(
    graph: GraphBuilder, module: Callable[..., Any], inputs: Sequence[Tensor], name: str
) -> list[Tensor]:
    """Append what a module does.

    Args:
        graph: Where to.
        module: Parameters on `meta`.
        inputs: Its arguments.
        name: Precedes the names of its values.

    Returns:
        What it returns.

    Raises:
        NotImplementedError: It calls what is not in `OPERATORS`, or see `record`.
    """
    recording = record(module, [tensor.spec for tensor in inputs])
    known: list[Tensor | None] = list(inputs)

    def resolve(value: Any) -> Any:
        if isinstance(value, Operand):
            return known[value.index]
        if isinstance(value, Stored):
            return graph.weight(value.parameter)
        if isinstance(value, Constant):
            return graph.constant(value.tensor)
        return type(value)(map(resolve, value)) if isinstance(value, (list, tuple)) else value

    with graph.scope(name):
        for call in recording.calls:
            results = _write(graph, call, {name: resolve(value) for name, value in call.arguments.items()})
            known += [*results, *[None] * (len(call.results) - len(results))]
        return [resolve(output) for output in recording.outputs]


def _write(graph: GraphBuilder, call: Call, arguments: dict[str, Any]) -> Sequence[Tensor]:
    domain, _, op_type = call.operator.rpartition("::")
    if domain == "onnx":
        return [graph.tensor(op_type, arguments["inputs"], call.results[0], **arguments["attributes"])]
    if call.operator not in OPERATORS:
        raise NotImplementedError(f"operator {call.operator} has no ONNX form here")
    written = OPERATORS[call.operator](graph, arguments, *call.results)
    return [written] if isinstance(written, Tensor) else written

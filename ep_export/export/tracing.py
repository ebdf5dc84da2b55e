"""A recorded module is written into a graph: every call becomes its ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ep_export.export.graph_builder import GraphBuilder, Tensor
from ep_export.export.operators import OPERATORS, Operator
from ep_export.export.recording import Call, Constant, Operand, Stored, record

__all__ = ["trace"]


_DOMAINS = {"onnx": "", "com.microsoft": "com.microsoft"}


def trace(
    graph: GraphBuilder,
    module: Callable[..., Any],
    inputs: Sequence[Tensor],
    name: str,
    *,
    operators: Mapping[str, Operator] = OPERATORS,
) -> list[Tensor]:
    """Append what a module does.

    Args:
        graph: Where to.
        module: Parameters on `meta`.
        inputs: Its arguments.
        name: Precedes the names of its values.
        operators: What recorded operators become.

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
            arguments = {name: resolve(value) for name, value in call.arguments.items()}
            results = _write(graph, call, arguments, operators)
            known += [*results, *[None] * (len(call.results) - len(results))]
        return [resolve(output) for output in recording.outputs]


def _write(
    graph: GraphBuilder, call: Call, arguments: dict[str, Any], operators: Mapping[str, Operator]
) -> Sequence[Tensor]:
    domain, _, op_type = call.operator.rpartition("::")
    if domain in _DOMAINS:
        attributes = {"domain": _DOMAINS[domain], **arguments["attributes"]}
        return graph.tensors(op_type, arguments["inputs"], call.results, **attributes)
    if call.operator not in operators:
        raise NotImplementedError(f"operator {call.operator} has no ONNX form here")
    written = operators[call.operator](graph, arguments, *call.results)
    return [written] if isinstance(written, Tensor) else written

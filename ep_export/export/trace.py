"""Modules of a model become small ONNX graphs whose weights are inputs.

A decoder has L equal layers; tracing one and stamping it L times (see `stamp`) takes the same time at any
depth. All modules go through the exporter together, side by side and unconnected: it spends most of its time
on things it does once a call. Weights enter as inputs, so that no pass over a piece can fold, copy or even
see them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch

from ep_export.export.linear import weights_to_gemm
from ep_export.export.reshapes import constant_reshapes

__all__ = ["Part", "Piece", "quiet", "run_on_meta", "trace"]

_LOGGERS = ("torch.onnx", "torch.export", "torch.__trace", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Part:
    """A module to trace.

    Attributes:
        module: Parameters on `meta`; real buffers are kept aside and become weights of the piece.
        examples: Example arguments; only shapes and types matter.
        dynamic: For every argument the axes that vary.
    """

    module: torch.nn.Module
    examples: Sequence[torch.Tensor]
    dynamic: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Piece:
    """A traced module. It shares its nodes with nobody, but they are not to be changed.

    Attributes:
        nodes: In topological order.
        inputs: One for each argument of the module.
        outputs: One for each value the module returns.
        weights: Parameter or buffer name in the module -> the input that stands for it, if it is used.
        buffers: Values the module computed at construction (rotary frequencies), by name.
        constants: Initializers the nodes read.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    weights: Mapping[str, ir.Value]
    buffers: Mapping[str, torch.Tensor]
    constants: tuple[ir.Value, ...]


class _SideBySide(torch.nn.Module):
    """Calls every part on its own arguments; nothing connects them."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(part.module for part in parts)
        self.counts = [len(part.examples) for part in parts]

    def forward(self, *arguments: torch.Tensor) -> list[list[torch.Tensor]]:
        results, start = [], 0
        for module, count in zip(self.parts, self.counts, strict=True):
            output = module(*arguments[start : start + count])
            results.append(list(output) if isinstance(output, (tuple, list)) else [output])
            start += count
        return results


def trace(parts: Sequence[Part], *, opset: int) -> list[Piece]:
    """Trace modules on `meta`, one piece each.

    Args:
        parts: The modules.
        opset: ONNX opset to write.
    """
    import onnxscript.optimizer

    together = _SideBySide(parts)
    with quiet(), _on_meta(together) as buffers, torch.no_grad():
        # A tensor passed twice would become one input: every argument gets its own.
        fresh = tuple(torch.empty_like(e, device="meta") for part in parts for e in part.examples)
        dynamic = tuple(
            dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for part in parts for axes in part.dynamic
        )
        program = torch.export.export(together, fresh, dynamic_shapes=(dynamic,), strict=False)
        exported = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
        counts = [len(outputs) for outputs in _output_structure(together, fresh)]
    assert exported is not None  # noqa: S101 - dynamo=True returns a program
    graph = exported.model.graph
    inputs = list(graph.inputs)
    names = {name for name, _ in together.named_parameters(remove_duplicate=False)} | set(buffers)
    weights = _weights_become_inputs(graph, names)
    weights_to_gemm(graph, set(weights.values()))
    with quiet():
        onnxscript.optimizer.optimize_ir(exported.model)
    constant_reshapes(graph)
    return list(_split(graph, inputs, weights, buffers, _shared(together), together.counts, counts))


def run_on_meta(module: torch.nn.Module, examples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of a module on `meta`: the examples for the piece after it."""
    with _on_meta(module), torch.no_grad():
        outputs = module(*(example.to("meta") for example in examples))
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _output_structure(together: _SideBySide, arguments: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    structure: list[list[torch.Tensor]] = together(*arguments)
    return structure


def _split(
    graph: ir.Graph,
    inputs: Sequence[ir.Value],
    weights: Mapping[str, ir.Value],
    buffers: Mapping[str, torch.Tensor],
    shared: Mapping[str, Sequence[str]],
    input_counts: Sequence[int],
    output_counts: Sequence[int],
) -> Iterator[Piece]:
    """Cut the common graph into what each part's outputs depend on."""
    first_in = first_out = 0
    for number, (count_in, count_out) in enumerate(zip(input_counts, output_counts, strict=True)):
        outputs = tuple(graph.outputs[first_out : first_out + count_out])
        live = _live_nodes(outputs)
        nodes = tuple(node for node in graph if node in live)
        read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
        prefix = f"parts.{number}."
        own = {
            here[0].removeprefix(prefix): v
            for name, v in weights.items()
            if v in read and (here := [each for each in shared.get(name, [name]) if each.startswith(prefix)])
        }
        yield Piece(
            nodes=nodes,
            inputs=tuple(inputs[first_in : first_in + count_in]),
            outputs=outputs,
            weights=own,
            buffers={name: buffers[prefix + name] for name in own if prefix + name in buffers},
            constants=tuple(value for value in read if value.is_initializer()),
        )
        first_in, first_out = first_in + count_in, first_out + count_out


def _shared(together: _SideBySide) -> dict[str, list[str]]:
    """All names of a parameter by each of them: one that two parts share is one input of the graph."""
    names: dict[int, list[str]] = {}
    for name, parameter in together.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group}


def _live_nodes(outputs: Sequence[ir.Value]) -> set[ir.Node]:
    live: set[ir.Node] = set()
    queue = [value.producer() for value in outputs]
    while queue:
        node = queue.pop()
        if node is not None and node not in live:
            live.add(node)
            queue.extend(value.producer() for value in node.inputs if value is not None)
    return live


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter: people see one progress bar, not its notes about operators we do not use."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _on_meta(module: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Put real buffers on `meta` for the block; yields their values by name."""
    values: dict[str, torch.Tensor] = {}
    owners: list[tuple[torch.nn.Module, str, torch.Tensor]] = []
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            continue
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        values[name] = buffer
        owners.append((owner, leaf, buffer))
        setattr(owner, leaf, buffer.to("meta"))
    try:
        yield values
    finally:
        for owner, leaf, buffer in owners:
            setattr(owner, leaf, buffer)


def _weights_become_inputs(graph: ir.Graph, names: set[str]) -> dict[str, ir.Value]:
    weights: dict[str, ir.Value] = {}
    for name in [name for name in graph.initializers if name in names]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
        weights[name] = value
    return weights

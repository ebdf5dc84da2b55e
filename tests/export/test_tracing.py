"""Modules recorded at two sizes and run in ONNX Runtime at a third, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch.nn import functional

from ep_export.bundle import Precision
from ep_export.export.graph_builder import GraphBuilder, Weights
from ep_export.export.operators import OPERATORS
from ep_export.export.recording import Spec, Varying, record
from ep_export.export.tracing import trace

Function = Callable[..., Any]
TABLE = torch.linspace(-1, 1, 12).reshape(3, 4)
NO_VALUES = torch.empty(4, device="meta")
WEIGHT = torch.nn.Parameter(TABLE.clone(), requires_grad=False)
T = Varying(5, 7)
SPECS = {
    "x": Spec((2, T, 4), torch.float32),
    "y": Spec((2, T, 4), torch.float32),
    "half": Spec((T, 4), torch.float16),
    "index": Spec((T,), torch.int64),
}

# What a case computes at [2, T, 4] tensors x and y, a float16 one [T, 4] and indices [T] below 3.
CASES: dict[str, Function] = {
    "neg": lambda i: -i.x,
    "cos": lambda i: i.x.cos(),
    "sin": lambda i: i.x.sin(),
    "sqrt": lambda i: (i.x * i.x).sqrt(),
    "rsqrt": lambda i: (i.x * i.x + 1).rsqrt(),
    "erf": lambda i: torch.erf(i.x),
    "relu": lambda i: functional.relu(i.x),
    "exp": lambda i: i.x.exp(),
    "log": lambda i: (i.x * i.x + 1).log(),
    "sigmoid": lambda i: i.x.sigmoid(),
    "tanh": lambda i: i.x.tanh(),
    "silu": lambda i: functional.silu(i.x),
    "gelu": lambda i: functional.gelu(i.x),
    "gelu, tanh": lambda i: functional.gelu(i.x, approximate="tanh"),
    "pow": lambda i: i.x**2,
    "add": lambda i: i.x + i.y,
    "add a number": lambda i: 3 + i.x,
    "sub": lambda i: i.x - i.y,
    "mul by a table": lambda i: i.x * TABLE[0],
    "mul of two types": lambda i: i.x[0] * i.half,
    "mul of integers and numbers": lambda i: i.index * 0.5,
    "div": lambda i: i.x / (i.y * i.y + 1),
    "lt": lambda i: i.x < i.y,
    "le a number": lambda i: i.x <= 0.25,
    "gt": lambda i: i.x > i.y,
    "ge": lambda i: i.x[0] >= i.half,
    "eq": lambda i: i.index == 1,
    "lt of integers and a fraction": lambda i: i.index < 1.5,
    "clamp of integers by a fraction": lambda i: i.index.clamp(max=0.5),
    "where": lambda i: torch.where(i.x < 0, i.x, i.y),
    "clamp": lambda i: i.x.clamp(min=0),
    "clamp on both sides": lambda i: i.x.clamp(-0.5, 0.5),
    "mean": lambda i: i.x.mean(-1, keepdim=True),
    "sum": lambda i: i.x.sum((0, 2)),
    "softmax": lambda i: i.x.softmax(-1),
    "softmax of another type": lambda i: i.half.softmax(-1, dtype=torch.float32),
    "layer norm": lambda i: functional.layer_norm(i.x, (4,), TABLE[0], TABLE[1], 1e-5),
    "matmul": lambda i: torch.matmul(i.x, i.y.transpose(1, 2)),
    "matmul by @ with a table": lambda i: i.x @ TABLE.T,
    "linear on rows": lambda i: functional.linear(i.x[0], TABLE),
    "linear with a bias": lambda i: functional.linear(i.x, TABLE, TABLE[:, 0]),
    "to": lambda i: i.half.float(),
    "views": lambda i: i.x.reshape(-1, 4).unsqueeze(1).squeeze(1).view(2, -1, 2, 2).flatten(2),
    "view of a permuted tensor": lambda i: i.x.permute(1, 2, 0).reshape(i.x.shape[1], 8),
    "view with two sizes that vary": lambda i: ((i.half @ i.half.t()).reshape(1, -1) + 1).reshape(
        i.half.shape[0], -1
    ),
    "t": lambda i: i.half.t(),
    "expand": lambda i: i.half[:, :1].expand(-1, 4),
    "expand to a size that varies": lambda i: i.x[:1, :1].expand(3, i.x.shape[1], 4),
    "cat": lambda i: torch.cat([i.x, i.y], 1),
    "cat of two types": lambda i: torch.cat([i.x[0], i.half], 0),
    "slice": lambda i: i.x[:, -1:, 1:3],
    "slice of every other": lambda i: i.x[:, 1::2],
    "slice up to a size that varies": lambda i: torch.cat([i.x, i.x], 1)[:, : i.x.shape[1]],
    "select": lambda i: i.x[1],
    "unbind": lambda i: i.x.unbind(2)[3],
    "chunk": lambda i: i.x.chunk(2, dim=-1)[1],
    "split": lambda i: i.x.split([1, 3], dim=-1)[1],
    "index_select": lambda i: WEIGHT.index_select(0, i.index),
    "embedding": lambda i: functional.embedding(i.index, WEIGHT),
    "contiguous": lambda i: i.x.transpose(0, 1).contiguous(),
    "alias": lambda i: i.x[:, :] + 1,
    "detach": lambda i: i.x.detach() + 0.0,
    "a table of numbers": lambda i: i.x + torch.arange(4, device=i.x.device).float(),
}


class _Inline(GraphBuilder):
    """Parameters by value: there is no checkpoint here."""

    def weight(self, parameter: torch.nn.Parameter) -> Any:
        return self.constant(parameter.data)


def _named(function: Function) -> Function:
    """Of the inputs in order instead of by name."""
    return lambda *inputs: function(SimpleNamespace(**dict(zip(SPECS, inputs, strict=True))))


def run(function: Function, length: int, path: Path) -> tuple[ir.Model, Any, torch.Tensor]:
    """(graph, ONNX Runtime's result, PyTorch's) at T = length."""
    graph = _Inline("case", precision=Precision.FP32, opset=20, weights=Weights({}, {}, lambda _: ("", path)))
    inputs = [
        graph.input(name, ["T" if size == T else size for size in spec.shape], spec)
        for name, spec in SPECS.items()
    ]
    (output,) = trace(graph, _named(function), inputs, "case")
    graph.output(output, "output", [str(i) for i in range(len(output.spec.shape))])
    model = graph.model()
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((2, length, 4)).astype(np.float32),
        "y": rng.standard_normal((2, length, 4)).astype(np.float32),
        "half": rng.standard_normal((length, 4)).astype(np.float16),
        "index": rng.integers(0, 3, length),
    }
    expected = _named(function)(*map(torch.from_numpy, feeds.values()))
    runner = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return model, runner.run(None, feeds)[0], expected


@pytest.mark.parametrize("case", CASES)
def test_an_operator_computes_what_pytorch_does_at_any_size(case: str, tmp_path: Path) -> None:
    for length in (6, 1):
        _, got, expected = run(CASES[case], length, tmp_path)
        assert (got.shape, got.dtype) == (tuple(expected.shape), expected.numpy().dtype)
        # one unit in the last digits of float16, or of a sum in float32
        np.testing.assert_allclose(got, expected, rtol=2e-3 if got.dtype == np.float16 else 1e-5, atol=1e-6)


def test_no_operator_is_there_without_a_case() -> None:
    recordings = [record(_named(case), list(SPECS.values())) for case in CASES.values()]
    called = {call.operator for recording in recordings for call in recording.calls}
    assert set(OPERATORS) == called


@pytest.mark.parametrize(
    ("function", "nodes"),
    [
        (lambda i: i.x.reshape(-1, 4).reshape(i.x.shape) * 1.0, ["Identity"]),
        (lambda i: i.x.float().contiguous()[:, :].expand(2, -1, -1), ["Identity"]),
        (lambda i: i.x.unsqueeze(1).unsqueeze(1), ["Reshape"]),
        (
            lambda i: functional.linear(functional.linear(i.x, TABLE), TABLE.T),
            ["Reshape", "Gemm", "Gemm", "Reshape"],
        ),
        (lambda i: functional.linear(functional.linear(i.x[0], TABLE), TABLE.T), ["Gather", "Gemm", "Gemm"]),
    ],
)
def test_what_moves_nothing_leaves_no_node(function: Function, nodes: Sequence[str], tmp_path: Path) -> None:
    model, *_ = run(function, 3, tmp_path)
    assert [node.op_type for node in model.graph] == nodes


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda i: i.x + 1 if i.x.shape[1] > 5 else i.x * 2, "does other things for inputs of other sizes"),
        (lambda i: i.x.add_(1), "aten::add_ writes into a tensor"),
        (lambda i: i.x * float(i.x.shape[1]), "became 7.0 for inputs of another size"),
        (lambda i: i.x[:, i.x.shape[1] - 1], "an entry whose place varies"),
        (lambda i: i.x.cumsum(1), "operator cumsum has no ONNX form here"),
        (lambda i: i.x + NO_VALUES, "without values"),
    ],
)
def test_what_has_no_graph_is_refused_by_name(function: Function, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=sentence):
        run(function, 6, tmp_path)


def test_graphs_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = (
        ir.to_proto(run(CASES["views"], 4, tmp_path)[0]).SerializeToString(deterministic=True) for _ in "12"
    )
    assert first == second

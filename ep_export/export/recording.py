"""A module becomes a list of operator calls: it is run twice on `meta`, with inputs of two sizes.

What differs between the two runs varies with the input, and everything else is fixed: no symbolic shapes are
needed, and a decoder layer takes milliseconds. Nothing is computed; what does not depend on the input (tables
from buffers) is, and enters the list as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "Call",
    "Constant",
    "Operand",
    "Recording",
    "Size",
    "Spec",
    "Stored",
    "Varying",
    "onnx_operator",
    "onnx_operators",
    "record",
]


@dataclass(frozen=True)
class Varying:
    """A size that varies with the input, in the first and the second run."""

    small: int
    large: int


Size: TypeAlias = int | Varying


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor."""

    shape: tuple[Size, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Operand:
    """A tensor of the recording: first the inputs, then every result in order."""

    index: int


@dataclass(frozen=True, eq=False)
class Stored:
    """A parameter of the module."""

    parameter: torch.nn.Parameter


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor whose values are known: a buffer, or what was computed of buffers alone."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class Call:
    """One operator call.

    Attributes:
        operator: Name without overload, as in `aten`; or `linear`, `matmul`, or `<domain>::<operator>`.
        arguments: By their names; tensors as `Operand`, `Stored` or `Constant`, numbers that vary as
            `Varying`.
        results: A spec for every tensor it returns.
    """

    operator: str
    arguments: Mapping[str, Any]
    results: tuple[Spec, ...]


@dataclass(frozen=True)
class Recording:
    """The calls of a module, and what it returns."""

    calls: tuple[Call, ...]
    outputs: tuple[Any, ...]


def record(module: Callable[..., Any], inputs: Sequence[Spec]) -> Recording:
    """Run a module twice.

    Args:
        module: Parameters on `meta`, buffers anywhere.
        inputs: Of its arguments.

    Raises:
        NotImplementedError: The module does other things for other sizes, writes into a tensor, or reads a
            value that is not there.
    """
    small, large = (_run(module, [_example(spec, which) for spec in inputs]) for which in (0, 1))
    if [call.operator for call in small.calls] != [call.operator for call in large.calls]:
        raise NotImplementedError("the module does other things for inputs of other sizes")
    calls = tuple(map(_merge, small.calls, large.calls))
    return Recording(calls, _merge(small.outputs, large.outputs))


_recorder: ContextVar[_Recorder] = ContextVar("recorder")


def onnx_operator(
    op_type: str, inputs: Sequence[torch.Tensor], attributes: Mapping[str, Any]
) -> torch.Tensor:
    """An ONNX operator whose output has the type and shape of its first input; only while recording."""
    (result,) = onnx_operators(op_type, inputs, attributes, like=inputs[:1])
    return result


def onnx_operators(
    op_type: str,
    inputs: Sequence[torch.Tensor],
    attributes: Mapping[str, Any],
    *,
    like: Sequence[torch.Tensor],
    domain: str = "onnx",
) -> Sequence[torch.Tensor]:
    """An operator with several outputs, or of another domain; only while recording.

    Args:
        op_type: Its name.
        inputs: In order.
        attributes: By name.
        like: Tensors that have the outputs' types and shapes.
        domain: `onnx` is the default domain.
    """
    arguments = {"inputs": list(inputs), "attributes": dict(attributes)}
    results = [x.shape for x in like], [x.dtype for x in like]

    def on_meta(_: Mapping[str, Any]) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(*results, strict=True)]

    return _recorder.get().record(f"{domain}::{op_type}", arguments, on_meta)  # type: ignore[no-any-return]


def _linear(arguments: Mapping[str, Any]) -> torch.Tensor:
    """A result of the right shape and type: PyTorch's own way there takes a millisecond on `meta`."""
    x, weight = arguments["input"], arguments["weight"]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))  # type: ignore[no-any-return]


def _matmul(arguments: Mapping[str, Any]) -> torch.Tensor:
    return torch.matmul(arguments["self"], arguments["other"])


# Kept whole: below them PyTorch has views and products of its own making.
_LINEAR = ("linear", ("input", "weight", "bias"), _linear)
_MATMUL = ("matmul", ("self", "other"), _matmul)
_WHOLE: Mapping[Any, tuple[str, tuple[str, ...], Callable[[Mapping[str, Any]], torch.Tensor]]] = {
    torch.nn.functional.linear: _LINEAR,
    torch.matmul: _MATMUL,
    torch.Tensor.matmul: _MATMUL,
    torch.Tensor.__matmul__: _MATMUL,
}


class _Whole(TorchFunctionMode):
    """Sees the functions of `_WHOLE` before they are taken apart."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _WHOLE:
            return func(*args, **(kwargs or {}))
        operator, names, on_meta = _WHOLE[func]
        arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        if any(
            isinstance(value, torch.Tensor) and self._recorder.depends(value) for value in arguments.values()
        ):
            return self._recorder.record(operator, arguments, on_meta)
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the calls whose result depends on the inputs or on parameters."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._operands: dict[int, Operand] = {}
        self._alive: list[torch.Tensor] = []  # so that no id is used twice
        self._inside = False
        for tensor in inputs:
            self._remember(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        schema = func._schema  # noqa: SLF001 - the one place where an operator's arguments have names
        arguments = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | dict(kwargs or {})
        if schema.is_mutable:
            raise NotImplementedError(f"{schema.name} writes into a tensor")
        positional = [a.name for a in schema.arguments if not a.kwarg_only]

        def run(values: Mapping[str, Any]) -> Any:
            order = [values[name] for name in positional if name in values]
            return func(*order, **{name: value for name, value in values.items() if name not in positional})

        return self.record(schema.name.removeprefix("aten::"), {**arguments, **given}, run)

    def record(
        self, operator: str, arguments: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Any]
    ) -> Any:
        """Run a call on `meta` and list it; or, where all its tensors have values, just compute it."""
        tensors = [value for value in _leaves(arguments) if isinstance(value, torch.Tensor)]
        self._inside = True
        try:
            if not any(map(self.depends, tensors)):
                return run({**arguments, "device": "cpu"} if "device" in arguments else arguments)
            result = run({name: _map(value, _to_meta) for name, value in arguments.items()})
        finally:
            self._inside = False
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        named = {name: _map(value, self.operand) for name, value in arguments.items()}
        self.calls.append(Call(operator, named, tuple(Spec(tuple(t.shape), t.dtype) for t in results)))
        for tensor in results:
            self._remember(tensor)
        return result

    def operand(self, value: Any) -> Any:
        """What stands for an argument in the list."""
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in self._operands:
            return self._operands[id(value)]
        if isinstance(value, torch.nn.Parameter):
            return Stored(value)
        if value.is_meta:
            raise NotImplementedError("a tensor without values that no recorded call returned")
        return Constant(value)

    def depends(self, tensor: torch.Tensor) -> bool:
        """Whether its values are only known when the graph runs."""
        return id(tensor) in self._operands or isinstance(tensor, torch.nn.Parameter)

    def _remember(self, tensor: torch.Tensor) -> None:
        self._operands[id(tensor)] = Operand(len(self._alive))
        self._alive.append(tensor)


def _run(module: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Recording:
    recorder = _Recorder(inputs)
    with torch.no_grad(), _active(recorder), recorder, _Whole(recorder):
        result = module(*inputs)
    results = [result] if isinstance(result, torch.Tensor) else result
    return Recording(tuple(recorder.calls), tuple(map(recorder.operand, results)))


@contextmanager
def _active(recorder: _Recorder) -> Iterator[None]:
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def _example(spec: Spec, run: int) -> torch.Tensor:
    shape = [size if isinstance(size, int) else (size.small, size.large)[run] for size in spec.shape]
    return torch.empty(shape, dtype=spec.dtype, device="meta")


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) and not value.is_meta else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return change(value)


def _merge(small: Any, large: Any) -> Any:
    """One description of what two runs did."""
    if isinstance(small, Call):
        arguments = {name: _merge(value, large.arguments[name]) for name, value in small.arguments.items()}
        return Call(small.operator, arguments, _merge(small.results, large.results))
    if isinstance(small, Spec):
        return Spec(_merge(small.shape, large.shape), small.dtype)
    if isinstance(small, (list, tuple)) and len(small) == len(large):
        return type(small)(map(_merge, small, large))
    if type(small) is int and type(large) is int and small != large:
        return Varying(small, large)
    if not _same(small, large):
        raise NotImplementedError(f"{small} became {large} for inputs of another size")
    return small


def _same(small: Any, large: Any) -> bool:
    if isinstance(small, Stored) and isinstance(large, Stored):
        return small.parameter is large.parameter
    if isinstance(small, Constant) and isinstance(large, Constant):
        return torch.equal(small.tensor, large.tensor)
    return bool(small == large)

"""TensorRT backend, both flavours: one engine a component, values kept in the GPU's memory.

A cache goes from one call into the next as the block it was computed into, or stays where it is and is
written in place; only what the host reads is copied.
Engines say in their record what they are for, and are refused before they are opened.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.engine_record import Limits, Profile
from ep_export.errors import UserError
from ep_export.runtime.base import Bound, Buffer, Feed, Filled, Runner, Value
from ep_export.runtime.bfloat16 import narrow, widen
from ep_export.runtime.device import Block, DeviceMemory

__all__ = ["DTYPES", "DeviceTensor", "OpenedEngine", "Scratch", "TensorRtRunner", "open_engine"]

DTYPES: Mapping[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,  # its bits
    "INT64": np.int64,
    "INT32": np.int32,
    "BOOL": np.bool_,
}
"""TensorRT's types of inputs and outputs -> how their bytes are seen on the host."""


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor in the GPU's memory, behind the contracts `Value` and `Buffer`.

    Attributes:
        shape: Its shape.
        kind: TensorRT's name of its type.
        block: Where it lies.
        memory: Whose block it is.
        offset: Bytes of the block before it.
    """

    shape: tuple[int, ...]
    kind: str
    block: Block
    memory: DeviceMemory
    offset: int = 0

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self.block.address + self.offset

    @property
    def nbytes(self) -> int:
        """Its size."""
        return _bytes(self.shape, self.kind)

    def numpy(self) -> NDArray[Any]:
        """Its values on the host; bfloat16 as float32."""
        values: NDArray[Any] = np.empty(self.shape, dtype=DTYPES[self.kind])
        if values.size:
            self.memory.device.copy_out(values, self.address)
        return widen(values) if self.kind == "BF16" else values

    def rows(self, start: int, stop: int) -> DeviceTensor:
        """See `Buffer.rows`."""
        offset = self.offset + start * (self.nbytes // self.shape[0])
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=offset)

    def write(self, row: int, values: Feed) -> None:
        """See `Buffer.write`; what lies on the device already does not visit the host."""
        entry, device = self.rows(row, row + 1), self.memory.device
        if isinstance(values, Filled):
            caches = values.caches
            if isinstance(caches, DeviceTensor) and (caches.shape, caches.kind) == (entry.shape, entry.kind):
                device.copy(entry.address, caches.address, entry.nbytes)
                return
        whole = np.zeros(entry.shape, dtype=DTYPES[self.kind])
        whole[:, :, : values.shape[2]] = _bits(values, self.kind)
        device.copy_in(entry.address, whole)


@dataclass(frozen=True)
class OpenedEngine:
    """A deserialised engine and what was said about it.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`.
        engine: Its ICudaEngine.
        name: For messages.
        profiles: In the order of the engine's profile indices.
        limits: What the engines were compiled for.
    """

    module: Any
    engine: Any
    name: str
    profiles: Sequence[Profile]
    limits: Limits


class TensorRtRunner(Runner):
    """A component in TensorRT.

    One execution context a profile; all of them, of all components, compute in the same scratch memory, since
    a session runs one at a time.
    """

    def __init__(
        self, opened: OpenedEngine, memory: DeviceMemory, scratch: Scratch, closed: Callable[[], None]
    ) -> None:
        """Read the engine's interface.

        Args:
            opened: The engine.
            memory: Of the GPU it was opened on.
            scratch: Shared with the session's other runners.
            closed: Called once when the runner closes.

        Raises:
            UserError: The engine has not the profiles its record says.
        """
        engine, mode = opened.engine, opened.module.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.input_names = tuple(name for name in names if engine.get_tensor_mode(name) == mode.INPUT)
        self.output_names = tuple(name for name in names if engine.get_tensor_mode(name) == mode.OUTPUT)
        if engine.num_optimization_profiles != len(opened.profiles):
            raise UserError(
                f"engine {opened.name} has {engine.num_optimization_profiles} profiles, its record says "
                f"{len(opened.profiles)}",
                hint="compile again with `ep-export compile`",
            )
        self._kinds = {name: engine.get_tensor_dtype(name).name for name in names}
        host = opened.module.TensorLocation.HOST
        self._on_host = {name for name in names if engine.get_tensor_location(name) == host}
        self._opened, self._memory, self._scratch, self._closed = opened, memory, scratch, closed
        self._contexts: dict[int, Any] = {}
        self._aliases = _aliases(engine, self.output_names)
        self.capacity = _capacity(opened.profiles, self._aliases)
        self.max_batch = opened.limits.max_batch

    def run(self, feeds: Mapping[str, Feed], *, on_device: Collection[str] = ()) -> dict[str, Value]:  # noqa: ARG002
        """See `Runner.run`; every output stays on the device until it is read.

        Caches that an engine writes in place are written where they are, or in a copy of what is on the host.
        """
        return self._run(feeds, {})

    def bind(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> Bound:
        """See `Runner.bind`."""

        def run(feeds: Mapping[str, Feed], wanted: Mapping[str, bool]) -> dict[str, Value]:
            results = self._run({**inputs, **feeds}, outputs)
            return {name: results[name] for name in wanted}

        return run

    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        """See `Runner.buffer`."""
        kind = self._kinds[name]
        size = _bytes(shape, kind)
        made = DeviceTensor(shape, kind, self._memory.take(size), self._memory)
        self._memory.device.clear(made.address, size)
        return made

    def _run(self, feeds: Mapping[str, Feed], into: Mapping[str, Value]) -> dict[str, Value]:
        opened = self._opened
        if set(feeds) != set(self.input_names):
            missing = sorted(set(self.input_names) - set(feeds))
            unknown = sorted(set(feeds) - set(self.input_names))
            raise UserError(f"{opened.name} misses inputs {missing} and does not know {unknown}")
        number = _profile(opened, {name: tuple(feed.shape) for name, feed in feeds.items()})
        _log(opened.module).last = ""
        context = self._context(number)
        held = {name: self._set_input(context, name, feed) for name, feed in feeds.items()}
        unknown_shapes = context.infer_shapes()
        if unknown_shapes:
            raise UserError(f"{opened.name} does not know its shapes from inputs: {list(unknown_shapes)}")
        in_place = {output: held[name] for output, name in self._aliases.items()}
        outputs = self._set_outputs(context, {**in_place, **into})
        self._scratch.lend(context)
        if not context.execute_async_v3(self._memory.device.stream):
            raise UserError(f"{opened.name} failed: {_log(opened.module).reason}")
        # waited for here, so that times and errors belong to the component that causes them
        self._memory.device.synchronize()
        del held
        return {name: output() for name, output in outputs.items()}

    def close(self) -> None:
        """See `Runner.close`."""
        if self._opened is not None:
            self._contexts.clear()
            self._opened = None  # type: ignore[assignment]  # unusable from here on, and its memory is free
            self._closed()

    def _context(self, number: int) -> Any:
        if number not in self._contexts:
            opened = self._opened
            strategy = opened.module.ExecutionContextAllocationStrategy.USER_MANAGED
            context = opened.engine.create_execution_context(strategy)
            stream = self._memory.device.stream
            if context is None or not context.set_optimization_profile_async(number, stream):
                raise UserError(
                    f"{opened.name} cannot be run: {_log(opened.module).reason}",
                    hint="see the GPU's free memory",
                )
            self._scratch.need(opened.engine.get_device_memory_size_for_profile_v2(number))
            self._contexts[number] = context
        return self._contexts[number]

    def _set_input(self, context: Any, name: str, feed: Feed) -> Any:
        """Shape and address of an input; returns what must live until the run is over."""
        kind = self._kinds[name]
        holder: Any
        if name in self._on_host:
            holder = _bits(feed, kind)
            address = holder.ctypes.data
        else:
            holder = self._on_device(feed, kind)
            address = holder.address
        if not context.set_input_shape(name, tuple(feed.shape)) or not context.set_tensor_address(
            name, address
        ):
            raise UserError(f"{self._opened.name} refuses input {name} of shape {list(feed.shape)}")
        return holder

    def _on_device(self, feed: Feed, kind: str) -> DeviceTensor:
        if isinstance(feed, DeviceTensor) and feed.kind == kind and feed.memory is self._memory:
            return feed
        values = _bits(feed, kind)
        block = self._memory.take(values.nbytes)
        if values.size:
            self._memory.device.copy_in(block.address, values)
        return DeviceTensor(tuple(feed.shape), kind, block, self._memory)

    def _set_outputs(self, context: Any, into: Mapping[str, Any]) -> dict[str, Callable[[], DeviceTensor]]:
        """Memory for every output: what is given, else of its inferred shape, or asked for while running."""
        outputs: dict[str, Callable[[], DeviceTensor]] = {}
        for name in self.output_names:
            kind, shape = self._kinds[name], tuple(context.get_tensor_shape(name))
            if name in into:
                set_memory = context.set_tensor_address(name, into[name].address)
                outputs[name] = lambda tensor=into[name]: tensor  # type: ignore[misc]  # each its own
            elif any(size < 0 for size in shape):
                allocator = _allocator(self._opened.module, self._memory, kind)
                set_memory = context.set_output_allocator(name, allocator)
                outputs[name] = allocator.tensor
            else:
                tensor = DeviceTensor(shape, kind, self._memory.take(_bytes(shape, kind)), self._memory)
                set_memory = context.set_tensor_address(name, tensor.address)
                outputs[name] = lambda tensor=tensor: tensor  # type: ignore[misc]  # each its own
            if not set_memory:
                raise UserError(f"{self._opened.name} refuses memory for its output {name}")
        return outputs


class Scratch:
    """Activation memory, one block for whichever context is running."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory, self._needed = memory, 0
        self._block: Block | None = None

    def need(self, size: int) -> None:
        """There will be a context that computes in so many bytes."""
        if size > self._needed:
            self._needed, self._block = size, None  # the old one goes back before the larger one is taken

    def lend(self, context: Any) -> None:
        """Let a context compute in it."""
        if self._block is None:
            self._block = self._memory.take(self._needed)
        context.set_device_memory(self._block.address, self._block.size)

    def close(self) -> None:
        """Give it back."""
        self._block = None


def open_engine(
    module: Any, file: Path, *, name: str, profiles: Sequence[Profile], limits: Limits
) -> OpenedEngine:
    """Deserialise an engine whose record was checked.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        file: The engine.
        name: For messages.
        profiles: From its record.
        limits: From its record.

    Raises:
        UserError: TensorRT refuses it.
    """
    log = _log(module)
    log.last = ""
    runtime = module.Runtime(log.logger)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        reason = _invalid(module, runtime, content)
        engine = None if reason else runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise UserError(
            f"engine {file} cannot be opened: {reason or log.reason}",
            hint="compile again with `ep-export compile`; other software may hold the GPU's memory",
        )
    return OpenedEngine(module, engine, name, profiles, limits)


def _aliases(engine: Any, outputs: Sequence[str]) -> dict[str, str]:
    """Output -> the input whose memory it has to share, as caches that are written in place do."""
    aliased = getattr(engine, "get_aliased_input_tensor", None)  # from TensorRT 10.15 on
    pairs = {name: aliased(name) for name in outputs} if aliased else {}
    return {output: name for output, name in pairs.items() if name}


def _capacity(profiles: Sequence[Profile], aliases: Mapping[str, str]) -> int | None:
    """C of the caches that are written in place."""
    name = next(iter(aliases.values()), None)
    return None if name is None else profiles[0].inputs[name].maximum[2]


def _invalid(module: Any, runtime: Any, content: mmap.mmap) -> str:
    """Why TensorRT-RTX would not run an engine, by its header; empty when it would, or cannot tell."""
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    validity, diagnostics = runtime.get_engine_validity(content[: runtime.engine_header_size])
    if validity != module.EngineValidity.INVALID:
        return ""
    known = module.EngineInvalidityDiagnostics.__members__.items()
    return ", ".join(flag.lower().replace("_", " ") for flag, value in known if int(value) & int(diagnostics))


def _profile(opened: OpenedEngine, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of the first profile that takes inputs of these shapes."""
    for number, profile in enumerate(opened.profiles):
        if profile.holds(shapes):
            return number
    # the profile that refuses fewest inputs is the one that was meant
    refused = min(
        (
            [name for name, shape in shapes.items() if not p.inputs[name].holds(shape)]
            for p in opened.profiles
        ),
        key=len,
    )
    ranges = [profile.inputs[refused[0]] for profile in opened.profiles]
    taken = " or ".join(f"{list(r.minimum)} to {list(r.maximum)}" for r in ranges)
    limits = opened.limits
    behind = f" ({limits.max_behind} behind a cut)" if limits.max_behind else ""
    raise UserError(
        f"input {refused[0]} of {opened.name} has shape {list(shapes[refused[0]])}, its engine takes {taken}",
        hint=f"these engines hold prompts of {limits.max_prompt} tokens{behind}, answers of "
        f"{limits.max_new_tokens} and pictures of {limits.max_pixels} pixels, {limits.max_batch} at once: "
        "ask for less, or compile for more (--max-prompt, --max-kept-tokens, --max-new-tokens, --max-pixels, "
        "--max-batch)",
    )


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    return math.prod(shape) * int(np.dtype(DTYPES[kind]).itemsize)


def _bits(feed: Feed, kind: str) -> NDArray[Any]:
    """On the host, in the engine's type."""
    values = feed if isinstance(feed, np.ndarray) else feed.numpy()
    if kind == "BF16":
        return narrow(values)
    return np.ascontiguousarray(values, dtype=DTYPES[kind])


class _Log:
    """TensorRT's logger, of which the last error is what a person gets to see."""

    def __init__(self, module: Any) -> None:
        log = self
        errors = (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR)

        class Logger(module.ILogger):  # type: ignore[misc]  # the module is known only now
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in errors:
                    log.last = message.strip().split("\n", 1)[0]

        self.last = ""
        self.logger = Logger()

    @property
    def reason(self) -> str:
        """Why what was just tried failed; who tries sets `last` to nothing before."""
        return self.last or "TensorRT gives no reason"


_logs: dict[str, _Log] = {}


def _log(module: Any) -> _Log:
    """One logger a flavour: TensorRT keeps the first one it is given for the whole process."""
    return _logs.setdefault(module.__name__, _Log(module))


def _allocator(module: Any, memory: DeviceMemory, kind: str) -> Any:
    """An output allocator for one output whose shape is known only when it is computed."""

    class Allocator(module.IOutputAllocator):  # type: ignore[misc]  # the module is known only now
        def __init__(self) -> None:
            module.IOutputAllocator.__init__(self)
            self._block: Block | None = memory.take(0)
            self._shape: tuple[int, ...] = ()

        def reallocate_output(self, _name: str, _memory: int, size: int, _alignment: int) -> int:
            if self._block is None or size > self._block.size:
                self._block = memory.take(size)
            return self._block.address

        def reallocate_output_async(
            self, name: str, address: int, size: int, alignment: int, _stream: int
        ) -> int:
            return self.reallocate_output(name, address, size, alignment)

        def notify_shape(self, _name: str, shape: Sequence[int]) -> None:
            self._shape = tuple(shape)

        def tensor(self) -> DeviceTensor:
            assert self._block is not None  # noqa: S101 - called once, after the run
            block, self._block = self._block, None  # the context keeps this allocator until its next run
            return DeviceTensor(self._shape, kind, block, memory)

    return Allocator()

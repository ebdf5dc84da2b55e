"""ONNX Runtime backend: one inference session a component, values kept as OrtValues where they were computed.

Outputs are bound to a device before a run. Without that ONNX Runtime brings every output to the host, so that
with a GPU every cache would cross the bus twice a token.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.runtime.base import Bound, Buffer, Feed, Runner, Value
from ep_export.runtime.bfloat16 import narrow, widen
from ep_export.runtime.onnxruntime_buffer import OrtBuffer, OrtRows
from ep_export.runtime.providers import CPU, device_of, node_counts, prepare_providers

__all__ = ["OnnxRuntimeOptions", "OnnxRuntimeRunner"]

_BFLOAT16 = 16  # TensorProto.DataType
_HOST = "cpu"
_ERRORS = (
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)
# What releases before an opset was official say of it, in a sentence of several.
_LATER_OPSET = re.compile(r"Opset (\d+) is under development.*?is till opset (\d+)", re.DOTALL)


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """How sessions are made.

    Attributes:
        providers: Execution providers in order of preference, by the names of `runtime.providers` or by ONNX
            Runtime's own. Only where the CPU is among them may nodes go to it.
        threads: Threads of one operator; ONNX Runtime's own choice when None.
        prepack: Let ONNX Runtime copy weights into the layout its kernels like best. Without it float32
            weights stay memory-mapped from the shards. Measured on 2 cores with 0.72 GB of weights: 0.69 GB
            less anonymous memory and equal prefill without it, decoding 1.2 times faster with it.
        exact: Multiply quantised weights by activations as they are; else ONNX Runtime rounds those to 8
            bits, which is faster and costs about 1 % of the product.
    """

    providers: Sequence[str] = ("CPUExecutionProvider",)
    threads: int | None = None
    prepack: bool = True
    exact: bool = False


@dataclass(frozen=True)
class _OrtTensor:
    """An OrtValue behind the `Value` contract."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    def numpy(self) -> NDArray[Any]:
        if self.value.element_type() == _BFLOAT16:  # .numpy() refuses what NumPy has no name for
            if self.value.device_name() != _HOST:
                raise UserError("bfloat16 values in a GPU's memory cannot be read from there by NumPy")
            raw = ctypes.string_at(self.value.data_ptr(), self.value.tensor_size_in_bytes())
            return widen(np.frombuffer(raw, dtype=np.uint16)).reshape(self.shape)
        array: NDArray[Any] = self.value.numpy()
        return array


class OnnxRuntimeRunner(Runner):
    """A component in ONNX Runtime.

    Attributes:
        nodes: Provider -> nodes of the graph it runs; empty where only the CPU was asked for.
    """

    def __init__(self, file: Path, options: OnnxRuntimeOptions | None = None) -> None:
        """Open a component; weights are found by their paths beside it.

        Raises:
            UsageError: There is no such provider.
            UserError: ONNX Runtime cannot load or run it, or a provider is missing here.
        """
        import onnxruntime

        options = options or OnnxRuntimeOptions()
        session_options = _session_options(options)
        providers = prepare_providers(options.providers, session_options)
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(file),
                session_options,
                providers=providers or None,
                enable_fallback=0,  # else it prints to stdout and goes on with the CPU
            )
        except _errors() as error:
            raise _cannot_load(file, error) from error
        started = self._session.get_providers()
        failed = [name for name in providers if name not in started]
        if failed:  # its libraries do not load: ONNX Runtime only warns
            raise UserError(
                f"ONNX Runtime could not start {failed[0]} for {file.name}",
                hint="check its driver and libraries, or give --provider cpu",
            )
        self.nodes = node_counts(self._session) if providers != [CPU] else {}
        self._device = device_of(options.providers)
        self._file = file
        self._types = {i.name: i.type for i in self._session.get_inputs()}
        self._to_ort, self._wrap = _converter(onnxruntime), onnxruntime.OrtValue
        self.input_names = tuple(self._types)
        self.output_names = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Feed], *, on_device: Collection[str] = ()) -> dict[str, Value]:
        """See `Runner.run`."""
        if set(feeds) != set(self.input_names):
            missing = sorted(set(self.input_names) - set(feeds))
            unknown = sorted(set(feeds) - set(self.input_names))
            raise UserError(f"{self._file.name} misses inputs {missing} and does not know {unknown}")
        wanted = {name: name in on_device for name in self.output_names}
        return self._run_bound(self._session.io_binding(), 0, feeds, wanted)

    def bind(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> Bound:
        """See `Runner.bind`."""
        binding = self._session.io_binding()
        for bound, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, rows in bound.items():
                assert isinstance(rows, OrtRows)  # noqa: S101 - of this runner's buffers
                bind(name, *rows.binding)
        held = [*inputs.values(), *outputs.values()]  # their memory is bound by address alone

        def run(feeds: Mapping[str, Feed], wanted: Mapping[str, bool]) -> dict[str, Value]:
            assert held  # noqa: S101 - alive as long as this
            return self._run_bound(binding, len(outputs), feeds, wanted)

        return run

    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        """See `Runner.buffer`."""
        return OrtBuffer.zeros(shape, self._types[name], self._device)

    def _run_bound(
        self, binding: Any, bound: int, feeds: Mapping[str, Feed], wanted: Mapping[str, bool]
    ) -> dict[str, Value]:
        """Run; ONNX Runtime allocates what is wanted, behind the outputs that were bound before."""
        # A binding does not keep an array that was converted alive, and reads it during the run.
        values = {name: self._to_ort(feed, self._types[name]) for name, feed in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name, stays in wanted.items():
            binding.bind_output(name, self._device if stays else _HOST)
        binding.synchronize_inputs()
        try:
            self._session.run_with_iobinding(binding)
        except _errors() as error:
            raise UserError(
                f"{self._file.name} failed: {_first_line(error)}",
                hint="check the inputs against the manifest",
            ) from error
        binding.synchronize_outputs()
        outputs = binding.get_outputs_as_ortvaluevector()  # without a Python object for every cache
        return {name: _OrtTensor(self._wrap(outputs[bound + i])) for i, name in enumerate(wanted)}

    def close(self) -> None:
        """See `Runner.close`."""
        self._session = None


def _session_options(options: OnnxRuntimeOptions) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # errors are raised; on stderr they would be noise between answers
    # A bundle is several sessions run one after another, each with its own threads: those of the last one
    # would spin on the cores the next one needs, so spinning stops with the run. Within it, threads spin as
    # long as what one of them computes alone between two parallel operators. Measured on 2 cores, an int4
    # decode step where nothing else ran: 11.8 ms, 14.5 without spinning; where 20 processes ran (with 20 us):
    # 23 ms, 19 without, 86 with ONNX Runtime's own duration.
    settings.add_session_config_entry("session.intra_op.spin_duration_us", "40")
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if not options.prepack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    if options.exact:
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return settings


def _converter(onnxruntime: Any) -> Callable[[Feed, str], Any]:
    """Feed -> OrtValue of an input's type."""
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    make_typed = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    types = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int64)": np.int64,
        "tensor(int32)": np.int32,
    }

    def convert(feed: Feed, kind: str) -> Any:
        if isinstance(feed, _OrtTensor):
            return feed.value
        array = feed if isinstance(feed, np.ndarray) else feed.numpy()
        if kind == "tensor(bfloat16)":
            return make_typed(narrow(array), _BFLOAT16)
        return make(np.ascontiguousarray(array, dtype=types[kind]))

    return convert


def _errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (*(getattr(state, name) for name in _ERRORS), RuntimeError)


def _cannot_load(file: Path, error: Exception) -> UserError:
    text = _first_line(error)
    if later := _LATER_OPSET.search(str(error)):
        return UserError(
            f"{file.name} has opset {later[1]}, ONNX Runtime here reads up to {later[2]}",
            hint="install a newer onnxruntime (and the Python it is there for), or export with "
            "--dialect onnxruntime or portable",
        )
    if "fallback to CPU EP has been explicitly disabled" in text:
        return UserError(
            f"the chosen provider cannot run all of {file.name}",
            hint="add --provider cpu after it: what it cannot run then goes to the CPU, and is counted",
        )
    if "NOT_IMPLEMENTED" in text:
        return UserError(
            f"ONNX Runtime has no kernel for {file.name} on this provider: {text}",
            hint="its CPU provider does not compute bfloat16: export with --precision fp32 or fp16",
        )
    return UserError(f"ONNX Runtime cannot load {file.name}: {text}", hint="build the bundle again")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

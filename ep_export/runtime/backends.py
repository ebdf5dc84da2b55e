"""Which backend runs a bundle, from a person's words to a `RunnerFactory`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from ep_export.bundle import Bundle
from ep_export.errors import UsageError
from ep_export.runtime.base import RunnerFactory
from ep_export.runtime.engines import EngineBackend
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeOptions, OnnxRuntimeRunner
from ep_export.runtime.providers import CPU, short_name

__all__ = ["OnnxRuntimeBackend", "Runtime", "choose_backend"]


class Runtime(str, Enum):
    """What runs a bundle."""

    ONNXRUNTIME = "onnxruntime"  # the ONNX files, on whatever its execution providers drive
    TENSORRT = "tensorrt"  # compiled engines, TensorRT or TensorRT-RTX


class OnnxRuntimeBackend:
    """Opens components in ONNX Runtime; a `RunnerFactory` that remembers where their nodes went.

    Args:
        options: For every component.
    """

    def __init__(self, options: OnnxRuntimeOptions) -> None:
        self._options = options
        self._nodes: Counter[str] = Counter()

    def __call__(self, file: Path) -> OnnxRuntimeRunner:
        """Open a component."""
        runner = OnnxRuntimeRunner(file, self._options)
        self._nodes.update(runner.nodes)
        return runner

    @property
    def sentence(self) -> str:
        """Where nodes went, when there was a choice; else empty."""
        if not self._nodes:
            return ""
        counts = {short_name(name): 0 for name in self._options.providers}
        for name, count in self._nodes.items():
            counts[short_name(name)] = count
        return "nodes of the graphs: " + ", ".join(f"{count} on {name}" for name, count in counts.items())


def choose_backend(
    bundle: Bundle,
    runtime: Runtime,
    *,
    target: str | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    exact: bool = False,
    verify: bool = True,
) -> RunnerFactory:
    """The backend that was asked for, checked as far as it can be before a component is opened.

    Args:
        bundle: The bundle.
        runtime: What runs it.
        target: Whose engines, for TensorRT; may be left out where there is one.
        providers: Execution providers for ONNX Runtime; the CPU when empty.
        threads: CPU threads for ONNX Runtime; its own choice when None.
        exact: See `OnnxRuntimeOptions`.
        verify: Compute the engines' checksums before use.

    Raises:
        UsageError: An option of the other runtime.
        UserError: See `EngineBackend`.
    """
    if runtime is Runtime.TENSORRT:
        if providers or threads or exact:
            raise UsageError(
                "--provider, --threads and --exact are ONNX Runtime's, and the runtime is tensorrt",
                hint="leave them out, or give --runtime onnxruntime",
            )
        return EngineBackend(bundle, target, verify=verify)
    if target is not None:
        raise UsageError(
            "--target chooses engines, and the runtime is onnxruntime", hint="add --runtime tensorrt"
        )
    return OnnxRuntimeBackend(OnnxRuntimeOptions(tuple(providers) or (CPU,), threads, exact=exact))

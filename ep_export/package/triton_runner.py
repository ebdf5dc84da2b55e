"""A component that a Triton server runs, behind the same contract as every backend.

Runs inside the server's Python backend alone: `triton_python_backend_utils` is what that gives a model.
Tensors travel as NumPy arrays through the server's shared memory, caches included.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Manifest
from ep_export.errors import UserError
from ep_export.runtime.base import Feed, Runner, Value

__all__ = ["TritonFactory", "TritonRunner", "server"]


def server() -> Any:
    """What Triton's Python backend gives a model to talk with; there is no such module anywhere else."""
    import triton_python_backend_utils  # type: ignore[import-not-found]

    return triton_python_backend_utils


@dataclass(frozen=True)
class _HostTensor:
    """An output behind the `Value` contract; it was asked for in the host's memory."""

    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def numpy(self) -> NDArray[Any]:
        return self.values


class TritonRunner(Runner):
    """One model of the server.

    Args:
        model: Its name there.
        types: Input -> type, as in the manifest.
        outputs: Names of its outputs.
    """

    def __init__(self, model: str, types: Mapping[str, str], outputs: tuple[str, ...]) -> None:
        self._model, self._types = model, {name: np.dtype(dtype) for name, dtype in types.items()}
        self.input_names, self.output_names = tuple(types), outputs

    def run(self, feeds: Mapping[str, Feed], *, on_device: Collection[str] = ()) -> dict[str, Value]:  # noqa: ARG002
        """See `Runner.run`; tensors travel through the host's memory, all of them."""
        triton = server()
        if set(feeds) != set(self._types):
            missing, unknown = sorted(set(self._types) - set(feeds)), sorted(set(feeds) - set(self._types))
            raise UserError(f"{self._model} misses inputs {missing} and does not know {unknown}")
        request = triton.InferenceRequest(
            model_name=self._model,
            requested_output_names=list(self.output_names),
            inputs=[triton.Tensor(name, self._array(name, feed)) for name, feed in feeds.items()],
            preferred_memory=triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise UserError(
                f"{self._model} failed: {response.error().message()}",
                hint="the server's log has the whole message",
            )
        outputs = {tensor.name(): _HostTensor(tensor.as_numpy()) for tensor in response.output_tensors()}
        return {name: outputs[name] for name in self.output_names}

    def close(self) -> None:
        """See `Runner.close`; the server keeps its models."""

    def _array(self, name: str, feed: Feed) -> NDArray[Any]:
        array = feed if isinstance(feed, np.ndarray) else feed.numpy()
        return np.ascontiguousarray(array, dtype=self._types[name])


class TritonFactory:
    """Opens components as models of the server: a `RunnerFactory`.

    Args:
        manifest: The bundle's.
        prefix: Of the models' names: "<prefix>_<component>".
    """

    def __init__(self, manifest: Manifest, prefix: str) -> None:
        self._components = {component.file: component for component in manifest.components}
        self._prefix = prefix

    def __call__(self, file: Path) -> TritonRunner:
        """See `RunnerFactory`."""
        component = self._components[file.name]
        return TritonRunner(
            f"{self._prefix}_{component.name}",
            {spec.name: spec.dtype for spec in component.inputs},
            tuple(spec.name for spec in component.outputs),
        )

"""Our components as Polygraphy runners: its comparator then drives PyTorch and every backend alike."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER

from ep_export.bundle import Component
from ep_export.runtime.base import Runner
from ep_export.validate.component_oracle import Arrays, ComponentOracle

__all__ = ["BackendRunner", "Kept", "OracleRunner", "quiet"]

Kept = NDArray[np.int64] | None
"""Rows that a prune component is to keep, or None for its own choice."""


@contextmanager
def quiet() -> Iterator[None]:
    """Polygraphy logs every tensor to stdout, where our data goes; what it finds is in its results."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


class _ComponentRunner(BaseRunner):  # type: ignore[misc]  # polygraphy has no types
    """A component whose inputs the manifest describes."""

    def __init__(self, name: str, component: Component) -> None:
        super().__init__(name=name)
        self._component = component

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes as Polygraphy wants them; None for an axis that varies."""
        metadata = TensorMetadata()
        for spec in self._component.inputs:
            # bfloat16 values travel as float32: NumPy has no name for them
            dtype = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
            shape = tuple(axis if isinstance(axis, int) else None for axis in spec.shape)
            metadata.add(spec.name, dtype=dtype, shape=shape)
        return metadata

    def _run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        raise NotImplementedError

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, NDArray[Any]]:
        """Run once; times itself."""
        start = time.perf_counter()
        outputs = self._run(feed_dict)
        self.inference_time = time.perf_counter() - start
        return OrderedDict(outputs)


class OracleRunner(_ComponentRunner):
    """A component in PyTorch.

    Args:
        name: Of the runner, in results.
        component: The component.
        oracle: Runs it.
        kept: What a prune component keeps, one a run in turn.
    """

    def __init__(
        self, name: str, component: Component, oracle: ComponentOracle, kept: Sequence[Kept]
    ) -> None:
        super().__init__(name, component)
        self._oracle, self._kept = oracle, iter(kept)

    def _run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        return self._oracle.run(self._component, feeds, kept=next(self._kept))


class BackendRunner(_ComponentRunner):
    """A component in the very session `ep-export run` would open.

    Args:
        name: Of the runner, in results.
        component: The component.
        open_runner: Opens it; called when Polygraphy activates the runner.
    """

    def __init__(self, name: str, component: Component, open_runner: Callable[[], Runner]) -> None:
        super().__init__(name, component)
        self._open = open_runner
        self._runner: Runner | None = None

    def activate_impl(self) -> None:
        """Open the session."""
        self._runner = self._open()

    def deactivate_impl(self) -> None:
        """Close it."""
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def _run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        assert self._runner is not None  # noqa: S101 - Polygraphy infers on active runners only
        return {name: np.array(value.numpy()) for name, value in self._runner.run(feeds).items()}

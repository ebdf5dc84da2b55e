"""The contract of a backend: open one component, run it, close it.

Values stay where the backend made them: a KV cache goes from one call into the next as the `Value` it came
out as, and only what the host needs (embeddings, logits, kept positions) is read as NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

__all__ = ["Bound", "Buffer", "Feed", "Filled", "Runner", "RunnerFactory", "Value"]


class Value(Protocol):
    """A tensor in the backend's keeping."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def numpy(self) -> NDArray[Any]:
        """Its values on the host; bfloat16 as float32."""
        ...


class Buffer(Value, Protocol):
    """Memory that outlives a run: caches [slots, KVH, capacity, D], read and written in place."""

    def rows(self, start: int, stop: int) -> Value:
        """Consecutive entries of the first axis: the same memory."""
        ...

    def write(self, row: int, values: Feed) -> None:
        """Copy [1, KVH, P, D] into the first P places of one entry; what lies behind them may change."""
        ...


Feed: TypeAlias = NDArray[Any] | Value


@dataclass(frozen=True)
class Filled(Value):
    """What is filled of caches of fixed capacity.

    Attributes:
        caches: [B, KVH, C, D].
        length: Rows that are filled.
    """

    caches: Value
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, KVH, length, D]."""
        return (*self.caches.shape[:2], self.length, *self.caches.shape[3:])

    def numpy(self) -> NDArray[Any]:
        """Its values on the host."""
        return self.caches.numpy()[:, :, : self.length]


class Bound(Protocol):
    """Runs with memory bound beforehand."""

    def __call__(self, feeds: Mapping[str, Feed], wanted: Mapping[str, bool]) -> dict[str, Value]:
        """Run once.

        Args:
            feeds: The inputs that were not bound.
            wanted: Outputs that come back -> whether they stay in the device's memory.

        Returns:
            What was wanted.

        Raises:
            UserError: The backend refuses an input.
        """
        ...


class Runner(ABC):
    """One opened component. Use as a context manager, or call `close`.

    Attributes:
        input_names: In the component's order.
        output_names: Likewise.
        capacity: C of its caches, where compiling settled it; None where any will do.
        max_batch: Most sequences of a run, where compiling settled it; None where any number will do.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    capacity: int | None = None
    max_batch: int | None = None

    @abstractmethod
    def run(self, feeds: Mapping[str, Feed], *, on_device: Collection[str] = ()) -> dict[str, Value]:
        """Run once.

        Args:
            feeds: Every input by name. NumPy floats of another width are converted to the input's type.
            on_device: Outputs that go into another run rather than to the host: where a backend can, they
                stay in its device's memory.

        Returns:
            Every output by name.

        Raises:
            UserError: An input is missing, unknown, or refused by the backend.
        """

    def bind(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> Bound:
        """Bind memory that outlives runs, once for many of them.

        Args:
            inputs: Inputs -> rows of a `Buffer` of this runner.
            outputs: Outputs -> rows of a `Buffer`, also those that an input reads: they are written in place.

        Returns:
            A run of the other inputs; see `Bound`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no memory that outlives a run")

    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        """Zeros of an input's type in the memory this runner computes in.

        Args:
            name: Of the input.
            shape: Of the memory.
        """
        raise NotImplementedError(f"{type(self).__name__} has no memory that outlives a run")

    @abstractmethod
    def close(self) -> None:
        """Give back the backend's memory; the runner cannot be used afterwards."""

    def __enter__(self) -> Runner:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class RunnerFactory(Protocol):
    """Opens a component's file in one backend."""

    def __call__(self, file: Path) -> Runner:
        """Open.

        Raises:
            UserError: The backend cannot run it; says what to do.
        """
        ...

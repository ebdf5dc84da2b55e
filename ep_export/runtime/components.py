"""The opened components of a bundle, and a span of its decoder as one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Bundle, Component, Manifest, Role
from ep_export.dims import DecoderDims
from ep_export.runtime.base import Bound, Feed, Filled, Runner, RunnerFactory, Value
from ep_export.runtime.embedding_rows import EmbeddingRows

__all__ = [
    "Components",
    "bind_span",
    "cache_names",
    "empty_caches",
    "length_feeds",
    "open_component",
    "past_feeds",
    "run_span",
]

_LOGITS = "logits"
_WRITE_INDEX = "write_index"
_PAST, _PRESENT = "past_key_values.", "present."


class Components:
    """The components of a bundle, each opened when it is first used.

    Args:
        manifest: The bundle's.
        open_component: Opens one.

    Attributes:
        manifest: The bundle's.
    """

    def __init__(self, manifest: Manifest, open_component: Callable[[Component], Runner]) -> None:
        self.manifest = manifest
        self._open = open_component
        self._runners: dict[str, Runner] = {}

    def runner(self, component: Component) -> Runner:
        """The runner of a component.

        Raises:
            UserError: The backend cannot open it.
        """
        if component.name not in self._runners:
            self._runners[component.name] = self._open(component)
        return self._runners[component.name]

    @property
    def max_batch(self) -> int | None:
        """Most answers that one decode step continues; None where any number will do."""
        if not self.manifest.dialect.fixed_caches:
            return None  # they are continued one by one
        limits = [self.runner(span).max_batch for span in self.manifest.spans]
        return min((limit for limit in limits if limit is not None), default=None)

    def open_all_but_prunes(self) -> None:
        """Open what every prompt needs; a bundle may hold many policies, of which a prompt needs one a cut.

        Raises:
            UserError: One cannot be opened; what was open is closed.
        """
        try:
            for component in self.manifest.components:
                if component.role is not Role.PRUNE:
                    self.runner(component)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what is open."""
        while self._runners:
            self._runners.popitem()[1].close()


def open_component(bundle: Bundle, component: Component, factory: RunnerFactory) -> Runner:
    """What runs a component: the backend, but for an embedding table, whose rows are read on the host.

    Raises:
        UserError: The backend cannot open it, or the table does not lie where the manifest says.
    """
    if component.table is not None:
        return EmbeddingRows(bundle, component)
    return factory(bundle.file(component.file))


def run_span(
    components: Components, span: Component, hidden: Feed, position_ids: Feed, caches: Mapping[str, Feed]
) -> dict[str, Value]:
    """One span over new positions; only logits come to the host.

    Args:
        components: The opened bundle.
        span: Which.
        hidden: [1, T, d], what enters its first layer.
        position_ids: [A, 1, T] int64.
        caches: Of at least its layers, by input name; all their rows are filled.

    Returns:
        Its outputs by name.
    """
    runner = components.runner(span)
    if _WRITE_INDEX in runner.input_names:
        return _run_with_room(components, span, hidden, position_ids, caches)
    past = {name: caches[name] for name in runner.input_names if name.startswith(_PAST)}
    feeds: dict[str, Feed] = {"inputs_embeds": hidden, "position_ids": position_ids, **past}
    lengths = length_feeds([next(iter(past.values())).shape[2]], hidden.shape[1])
    feeds |= {name: array for name, array in lengths.items() if name in runner.input_names}
    return runner.run(feeds, on_device=set(runner.output_names) - {_LOGITS})


def _run_with_room(
    components: Components, span: Component, hidden: Feed, position_ids: Feed, caches: Mapping[str, Feed]
) -> dict[str, Value]:
    """`run_span` of a span that only writes into room its caches have: into new ones with enough of it."""
    runner, dims = components.runner(span), components.manifest.dims
    names = list(cache_names(span.layer_range))
    past, new = caches[names[0]].shape[2], hidden.shape[1]
    shape = (1, dims.kv_heads, runner.capacity or past + new, dims.head_dim)
    buffers = {name: runner.buffer(name, shape) for name in names}
    for name, buffer in buffers.items() if past else ():
        buffer.write(0, caches[name])
    rows = {name: buffer.rows(0, 1) for name, buffer in buffers.items()}
    feeds = {"inputs_embeds": hidden, "position_ids": position_ids, _WRITE_INDEX: np.array([past])}
    wanted = {name: name != _LOGITS for name in runner.output_names if not name.startswith(_PRESENT)}
    outputs = bind_span(components, span, rows)(feeds, wanted)
    presents = {_present(name): Filled(row, past + new) for name, row in rows.items()}
    return {**outputs, **presents}


def _present(cache: str) -> str:
    """The output that continues a cache."""
    return cache.replace(_PAST, _PRESENT, 1)


def bind_span(components: Components, span: Component, caches: Mapping[str, Value]) -> Bound:
    """One span that writes new positions into caches of fixed capacity.

    Args:
        components: The opened bundle.
        span: Which.
        caches: Of its layers, by input name: rows of its runner's buffers.
    """
    outputs = {_present(name): cache for name, cache in caches.items()}
    return components.runner(span).bind(caches, outputs)


def length_feeds(past: Sequence[int] | NDArray[np.int64], new: int) -> dict[str, NDArray[Any]]:
    """What a span of fixed capacity is told of its caches; a span takes those of these inputs it has.

    Args:
        past: Filled rows, one number for every sequence of the batch.
        new: T, positions that follow.

    Returns:
        `write_index` [B] int64, as TensorScatter reads it; `seqlens_k` [B] and `total_sequence_length` [1]
        int32, as GroupQueryAttention does.
    """
    last = np.asarray(past, dtype=np.int32) + (new - 1)
    return {
        _WRITE_INDEX: np.asarray(past, dtype=np.int64),
        "seqlens_k": last,
        "total_sequence_length": np.array([last.max() + 1], dtype=np.int32),
    }


def cache_names(layers: Iterable[int]) -> Iterator[str]:
    """Names of the caches that spans of these layers take."""
    return (f"{_PAST}{i}.{part}" for i in layers for part in ("key", "value"))


def empty_caches(dims: DecoderDims) -> dict[str, Feed]:
    """Caches of length 0 for all layers; runners convert their type."""
    empty: Any = np.zeros((1, dims.kv_heads, 0, dims.head_dim), dtype=np.float32)
    return dict.fromkeys(cache_names(range(dims.layers)), empty)


def past_feeds(outputs: Mapping[str, Value]) -> dict[str, Value]:
    """`present.*` of one step under the names the next step takes them by."""
    return {
        name.replace(_PRESENT, _PAST, 1): value
        for name, value in outputs.items()
        if name.startswith(_PRESENT)
    }

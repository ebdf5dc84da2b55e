"""The opened components of a bundle, and a span of its decoder as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ep_export.bundle import Component, Manifest, Role
from ep_export.dims import DecoderDims
from ep_export.runtime.base import Feed, Runner, Value

__all__ = ["Components", "empty_caches", "past_feeds", "run_span"]

_LOGITS = "logits"
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


def run_span(
    components: Components, span: Component, hidden: Feed, position_ids: Feed, caches: Mapping[str, Feed]
) -> dict[str, Value]:
    """One span over new positions; only logits come to the host.

    Args:
        components: The opened bundle.
        span: Which.
        hidden: [1, T, d], what enters its first layer.
        position_ids: [A, 1, T] int64.
        caches: Of at least its layers, by input name.

    Returns:
        Its outputs by name.
    """
    runner = components.runner(span)
    feeds: dict[str, Feed] = {"inputs_embeds": hidden, "position_ids": position_ids}
    feeds |= {name: caches[name] for name in runner.input_names if name.startswith(_PAST)}
    return runner.run(feeds, on_device=set(runner.output_names) - {_LOGITS})


def empty_caches(dims: DecoderDims) -> dict[str, Feed]:
    """Caches of length 0 for all layers; runners convert their type."""
    empty: Any = np.zeros((1, dims.kv_heads, 0, dims.head_dim), dtype=np.float32)
    return {f"{_PAST}{i}.{part}": empty for i in range(dims.layers) for part in ("key", "value")}


def past_feeds(outputs: Mapping[str, Value]) -> dict[str, Value]:
    """`present.*` of one step under the names the next step takes them by."""
    return {
        name.replace(_PRESENT, _PAST, 1): value
        for name, value in outputs.items()
        if name.startswith(_PRESENT)
    }

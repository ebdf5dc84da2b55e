"""The inputs on which components are compared: what the oracle itself computed before each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.bundle import Component, Manifest, Role
from ep_export.reference import PruneSpec, capture
from ep_export.runtime.bfloat16 import narrow, widen
from ep_export.runtime.components import length_feeds
from ep_export.validate.component_oracle import Arrays, ComponentOracle

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ep_export.families.base import Family, PromptInputs
    from ep_export.policy import Keep, Schedule
    from ep_export.reference import PrefillStates

__all__ = ["ComponentFeeds", "component_feeds", "prune_feeds", "rounded"]


@dataclass(frozen=True)
class ComponentFeeds:
    """What one component is run on.

    Attributes:
        component: The component.
        cases: One name a run, for reports.
        feeds: One set of inputs a run, already rounded to the component's types.
    """

    component: Component
    cases: tuple[str, ...]
    feeds: tuple[dict[str, NDArray[Any]], ...]


def component_feeds(
    manifest: Manifest,
    schedule: Schedule,
    keep: Keep,
    *,
    family: Family,
    config: PreTrainedConfig,
    oracle: ComponentOracle,
    prompts: Mapping[str, PromptInputs],
    capacity: Mapping[str, int] | None = None,
) -> tuple[ComponentFeeds, ...]:
    """Inputs of every component that a schedule runs, for every prompt: prefill and first decode step.

    Args:
        manifest: The bundle's.
        schedule: From `Manifest.scheduled`.
        keep: Amount kept, as an average over layers.
        family: The model's.
        config: The model's.
        oracle: In float32.
        prompts: Name -> prompt.
        capacity: Span -> rows of caches that new ones are written into; just enough when None.
    """
    room = capacity or {}
    components = (*manifest.with_role(Role.VISION), manifest.embed, *manifest.stages(schedule))
    rows: dict[str, list[tuple[str, Arrays]]] = {component.name: [] for component in components}
    for name, prompt in prompts.items():
        for number, picture in enumerate(prompt.pictures):
            given = family.vision_feeds(picture, config)
            rows[picture.encoder].append((f"{name}, picture {number + 1}", given))
        rows[manifest.embed.name].append((name, {"input_ids": prompt.input_ids}))
        states = capture(oracle.model, prompt, PruneSpec(schedule, keep))
        for component, feeds in _prefill(manifest, schedule, states):
            rows[component.name].append((f"{name}, prefill", _with_room(feeds, room.get(component.name))))
        for component, feeds in _decode(manifest, oracle, prompt, states):
            rows[component.name].append((f"{name}, decode", _with_room(feeds, room.get(component.name))))
    return tuple(
        ComponentFeeds(
            component,
            tuple(name for name, _ in rows[component.name]),
            tuple(rounded(component, feeds) for _, feeds in rows[component.name]),
        )
        for component in components
    )


def prune_feeds(component: Component, states: PrefillStates, cut: int) -> Arrays:
    """What the oracle saw arrive at a cut, as inputs of its prune component.

    Args:
        component: One of the cut's.
        states: Of a prompt with pictures.
        cut: Its number.
    """
    trace, hidden = states.cuts[cut], states.hidden_before[cut]
    kept = len(trace.kept_index) - len(trace.arrived) + len(trace.visual_index)
    feeds = {
        "hidden": _numpy(hidden),
        "position_ids": states.position_ids[..., trace.arrived].numpy(),
        "visual_index": trace.tokens.visual_index.numpy(),
        "keep_slots": np.zeros(kept, dtype=np.int64),
    }
    if trace.tokens.states is not None:
        # states of text are not read
        every = torch.zeros((1, hidden.shape[1], *trace.tokens.states.shape[1:]))
        every[0, trace.tokens.visual_index] = trace.tokens.states.float()
        feeds["states"] = every.numpy()
    return {spec.name: feeds[spec.name] for spec in component.inputs}


def rounded(component: Component, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """Both sides must start from the same numbers: those the component's own types can hold."""
    return {spec.name: _as(feeds[spec.name], spec.dtype) for spec in component.inputs}


def _prefill(
    manifest: Manifest, schedule: Schedule, states: PrefillStates
) -> Iterator[tuple[Component, Arrays]]:
    """Every stage over the whole prompt, as `ep_export.runtime.prefill` feeds them."""
    dims = manifest.dims
    empty = np.zeros((1, dims.kv_heads, 0, dims.head_dim), dtype=np.float32)
    hidden, arrived = states.inputs_embeds, torch.arange(states.inputs_embeds.shape[1])
    for stage in manifest.stages(schedule):
        if stage.role is Role.DECODER:
            positions = states.position_ids[..., arrived].numpy()
            caches = dict.fromkeys(stage.layer_range, (empty, empty))
            yield stage, _span_feeds(stage, _numpy(hidden), positions, caches)
        elif stage.cut is not None:
            hidden = states.hidden_after[stage.cut]
            if states.cuts:  # without pictures spans run alone
                yield stage, prune_feeds(stage, states, stage.cut)
                arrived = states.cuts[stage.cut].kept_index


def _decode(
    manifest: Manifest, oracle: ComponentOracle, prompt: PromptInputs, states: PrefillStates
) -> Iterator[tuple[Component, Arrays]]:
    """Every span on the first generated token, behind the caches of the prefill."""
    token = np.array([[int(states.logits.argmax())]], dtype=np.int64)
    positions = np.full((manifest.dims.position_axes, 1, 1), prompt.next_position, dtype=np.int64)
    caches = {i: (_numpy(key), _numpy(value)) for i, (key, value) in enumerate(states.caches)}
    hidden = oracle.run(manifest.embed, {"input_ids": token})["inputs_embeds"]
    for span in manifest.spans:
        feeds = _span_feeds(span, hidden, positions, caches)
        yield span, feeds
        if span is not manifest.spans[-1]:
            hidden = oracle.run(span, feeds)["hidden_states"]


def _span_feeds(
    span: Component,
    hidden: NDArray[Any],
    positions: NDArray[np.int64],
    caches: Mapping[int, Sequence[NDArray[Any]]],
) -> dict[str, NDArray[Any]]:
    past = {
        f"past_key_values.{i}.{part}": array
        for i in span.layer_range
        for part, array in zip(("key", "value"), caches[i], strict=True)
    }
    lengths = length_feeds([caches[span.layer_range.start][0].shape[2]], hidden.shape[1])
    given = {"inputs_embeds": hidden, "position_ids": positions, **past, **lengths}
    return {spec.name: given[spec.name] for spec in span.inputs}


def _with_room(feeds: Arrays, capacity: int | None) -> Arrays:
    """Caches that new rows are written into, with rows of zeros behind what is filled."""
    if "write_index" not in feeds:
        return feeds
    rows = capacity or int(feeds["write_index"][0]) + feeds["inputs_embeds"].shape[1]
    return {
        name: np.pad(array, ((0, 0), (0, 0), (0, rows - array.shape[2]), (0, 0)))
        if name.startswith("past_key_values.")
        else array
        for name, array in feeds.items()
    }


def _as(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":  # NumPy has no such type: float32 that holds bfloat16 values
        return widen(narrow(values)).reshape(values.shape)
    return np.ascontiguousarray(values, dtype=np.dtype(dtype))


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.float().numpy()
    return array

"""The inputs on which components are compared: what the oracle itself computed at each component's door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.bundle import Component, Manifest
from ep_export.reference import PruneSpec, capture
from ep_export.runtime.bfloat16 import narrow, widen
from ep_export.validate.polygraphy_oracle import Arrays, Components

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ep_export.families.base import Family, PromptInputs
    from ep_export.reference import PrefillStates

__all__ = ["ComponentFeeds", "component_feeds"]


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
    family: Family,
    config: PreTrainedConfig,
    oracle: Components,
    prompts: Mapping[str, PromptInputs],
) -> tuple[ComponentFeeds, ...]:
    """Inputs of every component for every prompt: its prefill and its first decode step.

    Args:
        manifest: The bundle's.
        family: The model's.
        config: The model's.
        oracle: The float32 components.
        prompts: Name -> prompt.
    """
    plan = PruneSpec(manifest.policy, manifest.keep)
    rows: dict[str, list[tuple[str, Arrays]]] = {component.name: [] for component in manifest.components}
    for name, prompt in prompts.items():
        for number, picture in enumerate(prompt.pictures):
            rows[picture.encoder].append(
                (f"{name}, picture {number + 1}", family.vision_feeds(picture, config))
            )
        rows["embed_tokens"].append((name, {"input_ids": prompt.input_ids}))
        states = capture(oracle.model, prompt, plan)
        for step, feeds in (
            ("prefill", _prefill(manifest, states)),
            ("decode", _decode(manifest, oracle, prompt, states)),
        ):
            for component, given in feeds.items():
                rows[component].append((f"{name}, {step}", given))
    return tuple(_rounded(component, rows[component.name]) for component in manifest.components)


def _prefill(manifest: Manifest, states: PrefillStates) -> dict[str, Arrays]:
    """Head and tail over the whole prompt, as `ep_export.runtime.prefill` feeds them."""
    visual = states.visual_index.numpy()
    kept = int(np.isin(states.kept_index.numpy(), visual).sum())
    positions = states.position_ids.numpy()
    empty = np.zeros((1, manifest.dims.kv_heads, 0, manifest.dims.head_dim), dtype=np.float32)
    caches = [(empty, empty)] * manifest.dims.layers
    return {
        "decoder_head": {
            "inputs_embeds": _numpy(states.inputs_embeds),
            "position_ids": positions,
            # without a picture one position stands as visual index and is kept
            "visual_index": visual if len(visual) else np.zeros(1, dtype=np.int64),
            "keep_slots": np.zeros(kept or 1, dtype=np.int64),
            **_past(caches, range(manifest.policy.layer)),
        },
        "decoder_tail": {
            "hidden_states": _numpy(states.hidden_kept),
            "position_ids": positions[..., states.kept_index.numpy()],
            **_past(caches, range(manifest.policy.layer, manifest.dims.layers)),
        },
    }


def _decode(
    manifest: Manifest, oracle: Components, prompt: PromptInputs, states: PrefillStates
) -> dict[str, Arrays]:
    """Head and tail on the first generated token, behind the caches of the prefill."""
    token = np.array([[int(states.logits.argmax())]], dtype=np.int64)
    axes, layer = manifest.dims.position_axes, manifest.policy.layer
    positions = np.full((axes, 1, 1), prompt.next_position, dtype=np.int64)
    caches = [(_numpy(key), _numpy(value)) for key, value in states.caches]
    head = {
        **oracle.run("embed_tokens", {"input_ids": token}),
        "position_ids": positions,
        "visual_index": np.zeros(1, dtype=np.int64),
        "keep_slots": np.zeros(1, dtype=np.int64),
        **_past(caches, range(layer)),
    }
    tail = {
        "hidden_states": oracle.run("decoder_head", head)["hidden_states"],
        "position_ids": positions,
        **_past(caches, range(layer, manifest.dims.layers)),
    }
    return {"decoder_head": head, "decoder_tail": tail}


def _past(caches: Sequence[tuple[NDArray[Any], NDArray[Any]]], layers: range) -> dict[str, NDArray[Any]]:
    return {
        f"past_key_values.{i}.{part}": caches[i][number]
        for i in layers
        for number, part in enumerate(("key", "value"))
    }


def _rounded(component: Component, rows: Sequence[tuple[str, Arrays]]) -> ComponentFeeds:
    """Both sides must start from the same numbers: those the component's own types can hold."""
    return ComponentFeeds(
        component,
        tuple(name for name, _ in rows),
        tuple(
            {spec.name: _as(feeds[spec.name], spec.dtype) for spec in component.inputs} for _, feeds in rows
        ),
    )


def _as(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":  # NumPy has no such type: float32 that holds bfloat16 values
        return widen(narrow(values)).reshape(values.shape)
    return np.ascontiguousarray(values, dtype=np.dtype(dtype))


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.float().numpy()
    return array

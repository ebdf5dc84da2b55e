"""Prefill: pictures and prompt through vision encoder, embeddings, head and tail, up to the first logits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.families.base import PromptInputs
from ep_export.runtime.base import Feed, Runner, Value

__all__ = ["Components", "Prefill", "Timer", "past_feeds", "run_prefill", "step"]


@dataclass(frozen=True)
class Components:
    """The opened components of a bundle and what is needed to feed them.

    Attributes:
        runners: Component name -> runner.
        dims: The decoder's dimensions.
        layer: K: the head holds layers 0..K-1.
    """

    runners: Mapping[str, Runner]
    dims: DecoderDims
    layer: int


@dataclass(frozen=True)
class Prefill:
    """Everything prefill computed, for generation and for validation.

    Attributes:
        visual_embeds: One array a picture, [N_i, d].
        inputs_embeds: [1, S, d], visual embeddings in place.
        hidden_states: [1, M, d], the head's output after pruning.
        kept_index: [M] int64, prompt positions that reach layer K.
        kept_position_ids: [A, 1, M] int64.
        logits: [vocab_size] float32, of the last position.
        caches: `past_key_values.{i}.key` and `.value` -> value, as the next step takes them.
    """

    visual_embeds: tuple[NDArray[Any], ...]
    inputs_embeds: NDArray[Any]
    hidden_states: Value
    kept_index: NDArray[np.int64]
    kept_position_ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    caches: Mapping[str, Value]


class Timer:
    """Milliseconds by stage."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)


def run_prefill(
    components: Components,
    prompt: PromptInputs,
    vision_feeds: list[dict[str, NDArray[Any]]],
    kept: int,
    timer: Timer,
) -> Prefill:
    """Run the vision encoders once a picture, then the others once over the whole prompt.

    Args:
        components: The opened bundle.
        prompt: The prompt's arrays.
        vision_feeds: Inputs of the vision encoder each picture names, one a picture.
        kept: k, visual tokens that reach layer K; not read without a picture.
        timer: Gets vision, embed, head_prefill and tail_prefill.
    """
    embed = components.runners["embed_tokens"]
    with timer.stage("vision"):
        visual = tuple(
            components.runners[picture.encoder].run(feeds)["visual_embeds"].numpy()
            for picture, feeds in zip(prompt.pictures, vision_feeds, strict=True)
        )
    with timer.stage("embed"):
        embeds = embed.run({"input_ids": prompt.input_ids})["inputs_embeds"].numpy()
        if visual:
            embeds = embeds.copy()  # the runner's own memory
            embeds[0, prompt.visual_index] = np.concatenate(visual)
    # Without a picture one position stands as visual index and is kept: M = S, nothing is dropped.
    index = prompt.visual_index if visual else np.zeros(1, dtype=np.int64)
    head, tail = step(
        components,
        {
            "inputs_embeds": embeds,
            "position_ids": prompt.position_ids,
            "visual_index": index,
            "keep_slots": np.zeros(kept if visual else 1, dtype=np.int64),
        },
        empty_caches(components.dims),
        (timer, "head_prefill", "tail_prefill"),
    )
    return Prefill(
        visual_embeds=visual,
        inputs_embeds=embeds,
        hidden_states=head["hidden_states"],
        kept_index=head["kept_index"].numpy(),
        kept_position_ids=head["kept_position_ids"].numpy(),
        logits=tail["logits"].numpy().reshape(-1),
        caches=past_feeds({**head, **tail}),
    )


def step(
    components: Components,
    feeds: Mapping[str, Feed],
    caches: Mapping[str, Feed],
    timing: tuple[Timer, str, str],
) -> tuple[dict[str, Value], dict[str, Value]]:
    """Head, then tail; nothing comes back to the host in between.

    Args:
        components: The opened bundle.
        feeds: The head's inputs but the caches.
        caches: Of all layers, by input name.
        timing: The timer and its stage names for head and tail.

    Returns:
        Outputs of the head and of the tail.
    """
    timer, head_stage, tail_stage = timing
    head, tail = components.runners["decoder_head"], components.runners["decoder_tail"]
    with timer.stage(head_stage):
        made = head.run({**feeds, **_of(head, caches)})
    with timer.stage(tail_stage):
        onward = {"hidden_states": made["hidden_states"], "position_ids": made["kept_position_ids"]}
        return made, tail.run({**onward, **_of(tail, caches)})


def empty_caches(dims: DecoderDims) -> dict[str, Feed]:
    """Caches of length 0 for all layers; runners convert their type."""
    empty = np.zeros((1, dims.kv_heads, 0, dims.head_dim), dtype=np.float32)
    return {f"past_key_values.{i}.{part}": empty for i in range(dims.layers) for part in ("key", "value")}


def past_feeds(outputs: Mapping[str, Value]) -> dict[str, Value]:
    """`present.*` of one step under the names the next step takes them by."""
    return {
        name.replace("present.", "past_key_values.", 1): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }


def _of(runner: Runner, caches: Mapping[str, Feed]) -> dict[str, Feed]:
    """The caches this runner takes."""
    return {name: caches[name] for name in runner.input_names if name in caches}

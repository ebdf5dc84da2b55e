"""Prefill: pictures and prompt through vision encoder, embeddings, spans and cuts, up to the first logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Component, Role
from ep_export.families.base import PromptInputs
from ep_export.policy import Schedule, scored_source
from ep_export.runtime.base import Feed, Value
from ep_export.runtime.components import Components, empty_caches, past_feeds, run_span

__all__ = ["KeptCut", "Prefill", "Timer", "run_prefill", "run_prune"]

OwnTokens = Callable[[NDArray[np.float32]], int]
"""[N] scores of the visual tokens that arrive at a cut -> how many go on."""

_READ = frozenset({"kept_index", "scores"})
"""Outputs of a prune component that the host reads."""


@dataclass(frozen=True)
class KeptCut:
    """What a cut did to one prompt.

    Attributes:
        layer: K: what is kept enters this layer.
        policy: Name of the chooser.
        kept_index: [M] int64, prompt positions that go on.
        scores: [N] float32, of the visual tokens that arrived, in their order; None where nothing was scored.
        hidden_states: [1, M, d], what enters layer K.
        position_ids: [A, 1, M] int64.
    """

    layer: int
    policy: str
    kept_index: NDArray[np.int64]
    scores: NDArray[np.float32] | None
    hidden_states: Value
    position_ids: Value


@dataclass(frozen=True)
class Prefill:
    """Everything prefill computed, for generation and for validation.

    Attributes:
        visual_embeds: One array a picture, [N_i, d].
        inputs_embeds: [1, S, d], visual embeddings in place.
        cuts: In the order of their layers; none where nothing was to be pruned.
        logits: [vocab_size] float32, of the last position.
        caches: `past_key_values.{i}.key` and `.value` -> value, as the next step takes them; as long as what
            reached layer i.
        next_position: Position id of the first generated token.
    """

    visual_embeds: tuple[NDArray[Any], ...]
    inputs_embeds: NDArray[Any]
    cuts: tuple[KeptCut, ...]
    logits: NDArray[np.float32]
    caches: Mapping[str, Value]
    next_position: int

    @property
    def kept_index(self) -> NDArray[np.int64]:
        """[M] prompt positions that reach the last span; all of them where there was no cut."""
        return self.cuts[-1].kept_index if self.cuts else np.arange(self.inputs_embeds.shape[1])


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
    vision_feeds: Sequence[Mapping[str, NDArray[Any]]],
    cuts: tuple[Schedule, Sequence[int]] | None,
    timer: Timer,
    *,
    own: OwnTokens | None = None,
) -> Prefill:
    """Run the vision encoders once a picture, then everything else once over the whole prompt.

    Args:
        components: The opened bundle.
        prompt: The prompt's arrays.
        vision_feeds: Inputs of the vision encoder each picture names, one a picture.
        cuts: The bundle's schedule with the policies to use, and for every cut the visual tokens that go on;
            None runs the spans alone.
        timer: Gets vision, embed, prefill (all spans) and prune.
        own: Where every prompt has a keep of its own: says from the scores at the only cut how many go on, at
            most as many as `cuts` says. The prune component then runs twice: to score, and to keep.
    """
    visual = _encode(components, prompt, vision_feeds, timer)
    with timer.stage("embed"):
        embed = components.runner(components.manifest.embed)
        embeds = embed.run({"input_ids": prompt.input_ids})["inputs_embeds"].numpy()
        if visual:
            embeds = embeds.copy()  # the runner's own memory
            embeds[0, prompt.visual_index] = np.concatenate(visual)
    pruned, outputs, caches = _walk(components, prompt, embeds, cuts, timer, own)
    return Prefill(
        visual_embeds=visual,
        inputs_embeds=embeds,
        cuts=_in_prompt_positions(components, pruned),
        logits=outputs["logits"].numpy().reshape(-1),
        caches=caches,
        next_position=prompt.next_position,
    )


def run_prune(
    components: Components,
    prune: Component,
    arrived: Mapping[str, Feed],
    kept: int,
) -> dict[str, Value]:
    """One prune component, fed with what its chooser reads.

    Args:
        components: The opened bundle.
        prune: Which.
        arrived: `hidden` [1, S, d], `position_ids` [A, 1, S] and `visual_index` [N] of the sequence that
            arrives; `query_states` and the others where a span came before.
        kept: k, visual tokens that go on.

    Returns:
        Its outputs by name; positions are those of the sequence that arrives.
    """
    runner = components.runner(prune)
    feeds: dict[str, Feed] = {**arrived, "keep_slots": np.zeros(kept, dtype=np.int64)}
    source = None if prune.chooser is None else scored_source(prune.chooser)
    if source is not None and "states" in runner.input_names:
        feeds["states"] = arrived[f"{source.value}_states"]
    return runner.run(
        {name: feeds[name] for name in runner.input_names}, on_device=set(runner.output_names) - _READ
    )


def _encode(
    components: Components,
    prompt: PromptInputs,
    vision_feeds: Sequence[Mapping[str, NDArray[Any]]],
    timer: Timer,
) -> tuple[NDArray[Any], ...]:
    """Visual embeddings of every picture."""
    encoders = {encoder.name: encoder for encoder in components.manifest.with_role(Role.VISION)}
    with timer.stage("vision"):
        return tuple(
            components.runner(encoders[picture.encoder]).run(feeds)["visual_embeds"].numpy()
            for picture, feeds in zip(prompt.pictures, vision_feeds, strict=True)
        )


def _walk(
    components: Components,
    prompt: PromptInputs,
    embeds: NDArray[Any],
    cuts: tuple[Schedule, Sequence[int]] | None,
    timer: Timer,
    own: OwnTokens | None,
) -> tuple[list[tuple[Component, dict[str, Value]]], dict[str, Value], dict[str, Value]]:
    """From the embeddings to the logits; nothing comes back to the host but what it reads of a cut.

    Returns:
        Every prune component with its outputs; the last span's outputs; the caches of all layers.
    """
    manifest = components.manifest
    stages, kept = (manifest.spans, iter(())) if cuts is None else (manifest.stages(cuts[0]), iter(cuts[1]))
    arrived: dict[str, Feed] = {
        "hidden": embeds,
        "position_ids": prompt.position_ids,
        "visual_index": prompt.visual_index,
    }
    pruned: list[tuple[Component, dict[str, Value]]] = []
    caches: dict[str, Value] = {}
    outputs: dict[str, Value] = {}
    empty = empty_caches(manifest.dims)
    for stage in stages:
        if stage.role is Role.PRUNE:
            with timer.stage("prune"):
                most = next(kept)
                outputs = run_prune(components, stage, arrived, most)
                if own is not None and (fewer := own(outputs["scores"].numpy())) != most:
                    outputs = run_prune(components, stage, arrived, fewer)
            pruned.append((stage, outputs))
            arrived = {
                "hidden": outputs["kept_hidden"],
                "position_ids": outputs["kept_position_ids"],
                "visual_index": outputs["kept_visual_index"],
            }
        else:
            with timer.stage("prefill"):
                outputs = run_span(components, stage, arrived["hidden"], arrived["position_ids"], empty)
            caches |= past_feeds(outputs)
            if "hidden_states" in outputs:
                arrived |= {name: value for name, value in outputs.items() if name.endswith("_states")}
                arrived["hidden"] = outputs["hidden_states"]
    return pruned, outputs, caches


def _in_prompt_positions(
    components: Components, pruned: Sequence[tuple[Component, Mapping[str, Value]]]
) -> tuple[KeptCut, ...]:
    """What the cuts did; a later one speaks of positions in what the one before let through."""
    cuts: list[KeptCut] = []
    for prune, outputs in pruned:
        assert prune.cut is not None and prune.chooser is not None  # noqa: PT018, S101 - read_manifest checks
        index = outputs["kept_index"].numpy()
        cuts.append(
            KeptCut(
                layer=components.manifest.schedule.cuts[prune.cut].layer,
                policy=prune.chooser.name,
                kept_index=cuts[-1].kept_index[index] if cuts else index,
                scores=outputs["scores"].numpy() if "scores" in outputs else None,
                hidden_states=outputs["kept_hidden"],
                position_ids=outputs["kept_position_ids"],
            )
        )
    return tuple(cuts)

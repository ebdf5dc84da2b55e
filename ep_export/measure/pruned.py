"""Many pruned forwards of one prompt: batches of kept sets, run from where the unpruned pass stood.

Only the layers from the first cut on are computed, all kept sets of one shape in one batch. That is what the
pruned model computes when it is fed the same answer token by token, because both are causal in the same
order; the vision encoder and the layers before the cut are never run again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from ep_export.reference.spans import SpanRecorder, run_layers, staying

if TYPE_CHECKING:
    from ep_export.families.base import DecoderModules
    from ep_export.measure.full_pass import FullPass
    from ep_export.policy import Source

__all__ = ["Arrival", "Gap", "KeptSets", "arrivals", "gap", "pruned_log_probs", "rows_after"]

KeptSets: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""What one pruned forward keeps: for every cut its layer and the prompt positions of the visual tokens that
go on, ascending."""

_BATCH_TOKENS = 16384
"""Positions computed at once: bounds memory, 16384 of width 3584 and FFN 18944 are 1.5 GB in float32."""


@dataclass(frozen=True)
class Arrival:
    """The prompt as it arrives at a cut; what was fed after the prompt is left out.

    Attributes:
        layer: K.
        positions: [S] int64 prompt positions that arrive.
        visual_index: [N] int64, places of the visual tokens among them.
        hidden: [S, d] what enters layer K.
        projections: What layer K-1 projects, each [S, heads * head_dim]; empty where K is 0.
    """

    layer: int
    positions: torch.Tensor
    visual_index: torch.Tensor
    hidden: torch.Tensor
    projections: Mapping[Source, torch.Tensor]

    @classmethod
    def of(
        cls,
        full: FullPass,
        layer: int,
        rows: torch.Tensor,
        hidden: torch.Tensor,
        projections: Mapping[Source, torch.Tensor],
    ) -> Arrival:
        """Cut to the prompt.

        Args:
            full: The pass that it comes from.
            layer: K.
            rows: [M] int64 positions of prompt and answer that arrive.
            hidden: [M, d] what enters layer K.
            projections: What layer K-1 projects, each [M, heads * head_dim].
        """
        positions = rows[rows < full.prompt_length]
        return cls(
            layer=layer,
            positions=positions,
            visual_index=torch.isin(positions, full.visual_index).nonzero()[:, 0],
            hidden=hidden[: len(positions)],
            projections={
                source: states[: len(positions)].to(hidden.device)  # from another GPU, see `load_model`
                for source, states in projections.items()
            },
        )


@dataclass(frozen=True)
class Gap:
    """Distance of a pruned answer from the full one, summed over the answer's positions.

    Attributes:
        kl: Sum of KL(full || pruned) in nats.
        agreements: Positions where both have the same top token.
    """

    kl: float
    agreements: int


def gap(full: torch.Tensor, pruned: torch.Tensor) -> Gap:
    """Distance between predictions, both [answer, vocab] log-probabilities."""
    terms = full.exp() * (full - pruned)
    kl = terms.sum(dim=-1, dtype=torch.float64).clamp_min(0)  # rounding leaves about -1e-7 where it is 0
    return Gap(float(kl.sum()), int((full.argmax(-1) == pruned.argmax(-1)).sum()))


def pruned_log_probs(
    decoder: DecoderModules, full: FullPass, kept: Iterable[KeptSets]
) -> Iterator[tuple[KeptSets, torch.Tensor]]:
    """What the pruned model predicts for the answer.

    Args:
        decoder: The model's decoder.
        full: From `run_full`, with the layer of every first cut among its layers.
        kept: What is kept; each is run once.

    Yields:
        Each with [answer, vocab] float32 log-probabilities, in an order of its own.
    """
    for part in _batches(full, kept):
        with torch.inference_mode():
            hidden, _ = _run(decoder, full, part, len(decoder.layers))
            logits = decoder.lm_head(decoder.norm(hidden[:, -len(full.log_probs) :]))
        for sets, one in zip(part, logits, strict=True):
            yield sets, one.float().log_softmax(dim=-1)


def arrivals(
    decoder: DecoderModules, full: FullPass, kept: Iterable[KeptSets], layer: int
) -> Iterator[tuple[KeptSets, Arrival]]:
    """What arrives at a cut, after each of several beginnings.

    Args:
        decoder: The model's decoder.
        full: From `run_full`, with `layer` among its layers, and those of the cuts before it.
        kept: What the cuts before keep; empty sets where there is none before.
        layer: Of the cut, after those.

    Yields:
        Each with what arrives, in an order of its own.
    """
    begun = dict.fromkeys(kept)
    if () in begun:
        everything = torch.arange(full.length, device=full.visual_index.device)
        projections = {source: states[0] for source, states in full.projections.get(layer, {}).items()}
        yield (), Arrival.of(full, layer, everything, full.hidden[layer][0], projections)
    for part in _batches(full, (sets for sets in begun if sets)):
        with ExitStack() as undo, torch.inference_mode():
            recorder = SpanRecorder(decoder, [layer])
            recorder.install(undo)
            hidden, rows = _run(decoder, full, part, layer)
        for number, sets in enumerate(part):
            projected = recorder.projected(layer, number)
            yield sets, Arrival.of(full, layer, rows[number], hidden[number], projected)


def rows_after(full: FullPass, kept: Sequence[int]) -> torch.Tensor:
    """[M] positions of prompt and answer that go on where these visual tokens are kept."""
    visual = full.visual_index
    return staying(full.length, visual, torch.tensor(kept, dtype=torch.int64, device=visual.device))


def _run(
    decoder: DecoderModules, full: FullPass, kept: Sequence[KeptSets], end: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run kept sets of one shape from their first cut to before layer `end`.

    Returns:
        [sets, M, d] what enters that layer, and for each the [M] positions that do.
    """
    ends = [*(layer for layer, _ in kept[0]), end]
    hidden, rows = torch.empty(0), [torch.empty(0)]
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        before, rows = rows, [rows_after(full, sets[number][1]) for sets in kept]
        if number == 0:
            entering = [full.hidden[start][0].index_select(0, one) for one in rows]
        else:
            entering = [
                one.index_select(0, torch.searchsorted(arrived, going_on))
                for one, arrived, going_on in zip(hidden, before, rows, strict=True)
            ]
        hidden = run_layers(decoder, torch.stack(entering), range(start, stop), full.arguments, rows)
    return hidden, rows


def _batches(full: FullPass, kept: Iterable[KeptSets]) -> Iterator[list[KeptSets]]:
    """Different sets of one shape together: the same layers, and as many tokens kept at each."""
    shapes: dict[tuple[tuple[int, int], ...], dict[KeptSets, None]] = {}
    for sets in kept:
        shapes.setdefault(tuple((layer, len(positions)) for layer, positions in sets), {})[sets] = None
    for shape, group in shapes.items():
        tokens = full.length - len(full.visual_index) + shape[0][1]
        size = max(1, _BATCH_TOKENS // tokens)
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]

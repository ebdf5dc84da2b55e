"""One question, every way of pruning: who still answers it, and how far each moves the model.

The unpruned model runs once over prompt and answer; from there every way of pruning is one row of a batch
(see `ep_export.calibrate.fidelity`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.calibrate.fidelity import before_placeholder, gap, pruned_log_probs, run_full
from ep_export.calibrate.run import load_on
from ep_export.errors import UserError
from ep_export.runtime.pictures import open_picture
from ep_export.sweep.dataset import normalise
from ep_export.sweep.spelling import Speller, says
from ep_export.sweep.view import instruction_positions, token_view
from ep_export.sweep.ways import Spot, Way, keeps_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ep_export.calibrate.fidelity import FullPass, Gap
    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import DecoderModules, PromptBuilder, PromptInputs
    from ep_export.methods import TokenView
    from ep_export.sweep.dataset import Item

__all__ = ["Bench", "QuestionResult", "WayResult", "build_prompt", "choose_kept", "make_bench", "measure"]


@dataclass(frozen=True)
class Bench:
    """What stays the same from question to question.

    Attributes:
        model: The unpruned model.
        checkpoint: Where it comes from.
        builder: Its prompts.
        speller: Its tokenizer.
        spots: Layers and keeps that are compared.
        ways: Spot -> what is compared there.
        seeds: Draws of a method that leaves it to chance.
        seed: Of them.
        max_new_tokens: Longest answer that is generated.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    builder: PromptBuilder
    speller: Speller
    spots: tuple[Spot, ...]
    ways: Mapping[Spot, Sequence[Way]]
    seeds: int
    seed: int
    max_new_tokens: int

    @property
    def doors(self) -> tuple[int, ...]:
        """Layers whose inputs are needed: all that are compared, and what enters the decoder."""
        return tuple(sorted({0, *(spot.layer for spot in self.spots)}))

    @property
    def all_ways(self) -> list[Way]:
        """Everything that is compared, spot by spot."""
        return [way for spot in self.spots for way in self.ways[spot]]


@dataclass(frozen=True)
class WayResult:
    """One way of pruning on one question; a value a draw.

    Attributes:
        kl: Mean KL(full || pruned) over the positions of the unpruned model's own answer, nats.
        agreement: Share of these positions where the answer's token stays on top.
        right: "1" or "0" a draw; empty where no right answer is known.
    """

    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    right: str


@dataclass(frozen=True)
class QuestionResult:
    """One question.

    Attributes:
        key: See `Item.key`.
        visual_tokens: N.
        text_tokens: Other tokens of the prompt.
        full_answer: What the unpruned model says.
        full_right: Whether that is right; None where it is not known.
        query_entropy: [L] nats; empty for a picture that was seen before.
        key_entropy: [L] nats.
        ways: Way key -> result.
    """

    key: str
    visual_tokens: int
    text_tokens: int
    full_answer: str
    full_right: bool | None
    query_entropy: tuple[float, ...]
    key_entropy: tuple[float, ...]
    ways: Mapping[str, WayResult]


def make_bench(
    checkpoint: Checkpoint,
    *,
    spots: tuple[Spot, ...],
    ways: Mapping[Spot, Sequence[Way]],
    seeds: int,
    seed: int,
    max_new_tokens: int,
    device: str,
) -> Bench:
    """Load the model and what belongs to it; see `Bench` for the arguments.

    Raises:
        UserError: The device or a weight is missing.
    """
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    return Bench(
        model=load_on(checkpoint, device),
        checkpoint=checkpoint,
        builder=builder,
        speller=Speller(checkpoint.path, builder.eos_token_ids),
        spots=spots,
        ways=ways,
        seeds=seeds,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )


def measure(bench: Bench, item: Item, *, entropies: bool = True) -> QuestionResult:
    """Ask one question of the unpruned model and of every way of pruning it.

    Args:
        bench: The setting.
        item: What is asked.
        entropies: Also measure the layer entropies of its picture.

    Raises:
        UserError: The picture, the question or the answer cannot be used.
    """
    prompt = build_prompt(bench, item)
    spellings = [bench.speller.spell(answer) for answer in item.answers]
    own, full = _own_answer(bench, prompt, spellings, entropies=entropies)
    answer = bench.builder.decode(own).strip()
    right = normalise(answer) in {normalise(known) for known in item.answers} if item.answers else None
    if right and own[-1] in bench.speller.end:
        spellings = [own, *(ids for ids in spellings if ids[:-1] != own[:-1])]
    passes = [
        (
            ids,
            full
            if ids[:-1] == own[:-1] and len(ids) == len(own)
            else _pass(bench, prompt, ids, entropies=False),
        )
        for ids in spellings
    ]
    if entropies and not np.isfinite([*full.query_entropy, *full.key_entropy]).all():
        raise UserError("the model's states are not finite on this picture")
    ways: dict[str, WayResult] = {}
    views: dict[int, TokenView] = {}
    for spot in bench.spots:
        ways.update(_at_spot(bench, item, prompt, full, passes, spot, views))
    visual = len(prompt.visual_index)
    return QuestionResult(
        key=item.key,
        visual_tokens=visual,
        text_tokens=prompt.input_ids.shape[1] - visual,
        full_answer=answer,
        full_right=right,
        query_entropy=full.query_entropy if entropies else (),
        key_entropy=full.key_entropy if entropies else (),
        ways=ways,
    )


def build_prompt(bench: Bench, item: Item) -> PromptInputs:
    """The item's prompt.

    Raises:
        UserError: The picture cannot be read, or the question not be asked.
    """
    prompt = bench.builder.build([open_picture(item.picture.path)], item.question)
    if not len(prompt.visual_index):
        raise UserError("the prompt holds no visual tokens")
    return prompt


def choose_kept(bench: Bench, item: Item, way: Way, view: TokenView) -> list[torch.Tensor]:
    """The kept positions of one way on one prompt: a set for every draw.

    Every draw has a generator of its own, made from the seed, the question, the spot and the draw's number,
    so that a resumed run draws alike.
    """
    k = keeps_after(way.spot, bench.checkpoint.dims.layers, view.count)
    draws = bench.seeds if way.method.chance else 1
    found = []
    for draw in range(draws):
        digest = hashlib.sha256(f"{bench.seed}/{draw}/{way.key}/{item.key}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
        kept = way.method.choose(replace(view, rng=rng), k)
        if len(kept) != k or not torch.isin(kept, view.visual_index).all() or (kept.diff() <= 0).any():
            raise RuntimeError(
                f"{way.method.key} returned {kept.tolist()}, expected {k} ascending visual positions"
            )
        found.append(kept)
    return found


def _own_answer(
    bench: Bench, prompt: PromptInputs, spellings: Sequence[list[int]], *, entropies: bool
) -> tuple[list[int], FullPass]:
    """The unpruned model's greedy answer and a full pass over it.

    Most often it is the right one: that is tried first, because one pass costs less than generating.
    """
    from ep_export.reference import greedy

    for ids in spellings[:1]:
        full = _pass(bench, prompt, ids, entropies=entropies)
        if len(ids) <= bench.max_new_tokens and says(full.log_probs, ids, bench.speller.end):
            return ids, full
    checkpoint = bench.checkpoint
    own = greedy(bench.model, checkpoint.family, checkpoint.config, prompt, bench.max_new_tokens)
    own = before_placeholder(own, checkpoint.config)
    return own, _pass(bench, prompt, own, entropies=entropies)


def _pass(bench: Bench, prompt: PromptInputs, answer: Sequence[int], *, entropies: bool) -> FullPass:
    checkpoint = bench.checkpoint
    return run_full(
        bench.model,
        checkpoint.family,
        prompt,
        answer,
        layers=bench.doors,
        heads=checkpoint.dims.heads,
        entropies=entropies,
        projections=True,
    )


def _at_spot(
    bench: Bench,
    item: Item,
    prompt: PromptInputs,
    full: FullPass,
    passes: Sequence[tuple[list[int], FullPass]],
    spot: Spot,
    views: dict[int, TokenView],
) -> dict[str, WayResult]:
    """Every way at one layer and keep; sets that several ways choose are run once."""
    decoder = bench.checkpoint.family.decoder(bench.model)
    if spot.layer not in views:
        views[spot.layer] = token_view(
            decoder,
            bench.checkpoint.dims,
            full,
            spot.layer,
            prompt=prompt,
            instruction=instruction_positions(prompt, bench.speller.words(item.question)),
            rng=np.random.default_rng(0),
        )
    chosen = {way.key: choose_kept(bench, item, way, views[spot.layer]) for way in bench.ways[spot]}
    sets = {tuple(kept.tolist()): kept for draws in chosen.values() for kept in draws}
    judged = _judge(decoder, full, passes, spot.layer, list(sets.values()), bench.speller.end)
    outcomes = dict(zip(sets, judged, strict=True))
    answer_tokens = len(full.log_probs)
    results = {}
    for key, draws in chosen.items():
        found = [outcomes[tuple(kept.tolist())] for kept in draws]
        results[key] = WayResult(
            kl=tuple(float(f"{one.kl / answer_tokens:.6g}") for one, _ in found),
            agreement=tuple(one.agreements / answer_tokens for one, _ in found),
            right="".join(str(int(right)) for _, right in found) if passes else "",
        )
    return results


def _judge(
    decoder: DecoderModules,
    full: FullPass,
    passes: Sequence[tuple[list[int], FullPass]],
    layer: int,
    kept: Sequence[torch.Tensor],
    end: Sequence[int],
) -> list[tuple[Gap, bool]]:
    """For every kept set: distance over the model's own answer, and whether a right answer is given."""
    own = list(pruned_log_probs(decoder, full, layer, kept))
    right = [False] * len(kept)
    for ids, other in passes:
        said = own if other is full else pruned_log_probs(decoder, other, layer, kept)
        right = [was or says(one, ids, end) for was, one in zip(right, said, strict=True)]
    return list(zip([gap(full.log_probs, one) for one in own], right, strict=True))

"""One question, every way of pruning: how far each moves the model, and which still answers right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from ep_export.errors import UserError
from ep_export.first_token import prompt_plan
from ep_export.measure.bench import build_prompt
from ep_export.measure.choosing import Prompted, kept_by
from ep_export.measure.full_pass import before_placeholder, run_full
from ep_export.measure.layer_curves import LayerCurves
from ep_export.measure.pruned import gap, pruned_log_probs
from ep_export.measure.question import QuestionResult, WayResult, normalise
from ep_export.measure.scaled import scaled_outcomes
from ep_export.measure.spelling import says
from ep_export.measure.ways import UNPRUNED, on_weights

if TYPE_CHECKING:
    from ep_export.families.base import PromptInputs
    from ep_export.measure.bench import Bench
    from ep_export.measure.full_pass import FullPass
    from ep_export.measure.pruned import Gap, KeptSets
    from ep_export.measure.question import Question

__all__ = ["full_pass", "measure"]


def measure(bench: Bench, question: Question, *, entropies: bool = True) -> QuestionResult:
    """Ask one question of the unpruned model and of every way of pruning it.

    Args:
        bench: The setting.
        question: What is asked.
        entropies: Also measure the layer entropies of its picture, and what the setting wants beside them.

    Raises:
        UserError: The picture, the question or the answer cannot be used.
    """
    prompt = build_prompt(bench, question)
    spellings = [bench.speller.spell(answer) for answer in question.answers]
    own, full = _own_answer(bench, prompt, spellings, entropies=entropies)
    curves = full.curves or LayerCurves()
    if not curves.finite:
        raise UserError("the model's states are not finite on this picture")
    said = bench.builder.decode(own).strip()
    right = normalise(said) in {normalise(known) for known in question.answers} if spellings else None
    if right and own[-1] in bench.speller.end:
        spellings = [own, *(ids for ids in spellings if ids[:-1] != own[:-1])]
    asked = Prompted(question, prompt, full)
    ways = _ways(bench, asked, _passes(bench, asked, own, spellings), own, full)
    for name, rounded in bench.beside.items():
        again = Prompted(question, prompt, full_pass(rounded, prompt, own))
        passes = _passes(rounded, again, own, spellings)
        results = {UNPRUNED: _unpruned(rounded, again.full, passes, full)}
        results |= _ways(rounded, again, passes, own, full)
        ways |= {on_weights(key, name): result for key, result in results.items()}
    visual = len(prompt.visual_index)
    return QuestionResult(
        key=question.key,
        visual_tokens=visual,
        text_tokens=prompt.input_ids.shape[1] - visual,
        answer_tokens=len(own),
        full_answer=said,
        full_right=right,
        query_entropy=tuple(curves.query_entropy),
        key_entropy=tuple(curves.key_entropy),
        metrics={key: _short(values) for key, values in curves.metrics.items()},
        ways=ways,
        vision_flops=prompt_plan(bench.checkpoint, prompt).vision_flops,
    )


_Passes: TypeAlias = Sequence[tuple[list[int], "FullPass"]]
"""Spellings of the right answer, each with a model's unpruned pass over it."""


def _passes(
    bench: Bench, asked: Prompted, own: Sequence[int], spellings: Sequence[list[int]]
) -> list[tuple[list[int], FullPass]]:
    same = list(own[:-1])
    return [
        (ids, asked.full if ids[:-1] == same else full_pass(bench, asked.prompt, ids)) for ids in spellings
    ]


def _ways(
    bench: Bench, asked: Prompted, passes: _Passes, own: Sequence[int], reference: FullPass
) -> dict[str, WayResult]:
    """Every way of pruning one model.

    Args:
        bench: The setting, with that model.
        asked: What is asked, with the model's unpruned pass over `own`.
        passes: See `_Passes`.
        own: The answer of the unpruned model of full weights.
        reference: Its pass over it, which everything is compared with.
    """
    kept = kept_by(bench, asked, bench.setting.ways)
    outcomes = _judge(
        bench, asked.full, passes, [sets for draws in kept.values() for sets in draws], reference
    )
    known, spellings = bool(passes), [ids for ids, _ in passes]
    pruned = {
        key: _way_result([outcomes[sets] for sets in draws], len(own), known=known, kept=_counts(draws))
        for key, draws in kept.items()
    }
    scaled = {
        key: _way_result(
            [(one.gap, one.right)],
            len(own),
            known=known,
            kept=(one.visual_tokens,),
            vision_flops=one.vision_flops,
        )
        for key, one in scaled_outcomes(
            bench, asked.question, asked.prompt, reference, own, spellings
        ).items()
    }
    return pruned | scaled


def _unpruned(bench: Bench, full: FullPass, passes: _Passes, reference: FullPass) -> WayResult:
    """A model of rounded weights with every token, against the one of full weights."""
    right = any(says(one.log_probs, ids, bench.speller.end) for ids, one in passes)
    distance = gap(reference.log_probs, full.log_probs)
    visual = (len(full.visual_index),)
    return _way_result([(distance, right)], len(full.log_probs), known=bool(passes), kept=visual)


def _counts(draws: Sequence[KeptSets]) -> tuple[int, ...]:
    """Visual tokens that go on after every cut, the same for all draws."""
    return tuple(len(positions) for _, positions in draws[0])


def full_pass(
    bench: Bench, prompt: PromptInputs, answer: Sequence[int], *, entropies: bool = False
) -> FullPass:
    """The unpruned pass over a prompt and an answer, with the layers of all ways."""
    setting = bench.setting
    return run_full(
        bench.model,
        bench.checkpoint.family,
        prompt,
        answer,
        layers=setting.layers,
        projections=setting.looks,
        entropies=entropies,
        metrics=setting.metrics,
    )


def _own_answer(
    bench: Bench, prompt: PromptInputs, spellings: Sequence[list[int]], *, entropies: bool
) -> tuple[list[int], FullPass]:
    """The unpruned model's greedy answer and a full pass over it.

    Most often it is the right one: that is tried first, because one pass costs less than generating.
    """
    from ep_export.reference import greedy

    longest = bench.setting.max_new_tokens
    for ids in spellings[:1]:
        full = full_pass(bench, prompt, ids, entropies=entropies)
        if len(ids) <= longest and says(full.log_probs, ids, bench.speller.end):
            return ids, full
    checkpoint = bench.checkpoint
    own = greedy(bench.model, checkpoint.family, checkpoint.config, prompt, longest)
    own = before_placeholder(own, checkpoint.config)
    return own, full_pass(bench, prompt, own, entropies=entropies)


def _judge(
    bench: Bench,
    full: FullPass,
    passes: _Passes,
    kept: Sequence[KeptSets],
    reference: FullPass,
) -> dict[KeptSets, tuple[Gap, bool]]:
    """For everything kept: distance over the reference's answer, and whether a right answer is given."""
    gaps: dict[KeptSets, Gap] = {}
    right = dict.fromkeys(kept, False)
    own = [ids for ids, one in passes if one is full]
    for sets, log_probs in pruned_log_probs(bench.decoder, full, kept):
        gaps[sets] = gap(reference.log_probs, log_probs)
        right[sets] = any(says(log_probs, ids, bench.speller.end) for ids in own)
    for ids, other in passes:
        if other is not full:
            for sets, log_probs in pruned_log_probs(bench.decoder, other, kept):
                right[sets] |= says(log_probs, ids, bench.speller.end)
    return {sets: (gaps[sets], right[sets]) for sets in gaps}


def _way_result(
    draws: Sequence[tuple[Gap, bool]],
    answer_tokens: int,
    *,
    known: bool,
    kept: tuple[int, ...],
    vision_flops: int | None = None,
) -> WayResult:
    return WayResult(
        kl=_short([gap.kl / answer_tokens for gap, _ in draws]),
        agreement=tuple(gap.agreements / answer_tokens for gap, _ in draws),
        right="".join("01"[right] for _, right in draws) if known else "",
        kept=kept,
        vision_flops=vision_flops,
    )


def _short(values: Sequence[float]) -> tuple[float, ...]:
    """So many digits as any number here is good for: a journal line stays short."""
    return tuple(float(f"{value:.6g}") for value in values)

"""One question, every way of pruning: how far each moves the model, and which still answers right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    passes = [(ids, full if ids[:-1] == own[:-1] else full_pass(bench, prompt, ids)) for ids in spellings]
    kept = kept_by(bench, Prompted(question, prompt, full), bench.setting.ways)
    outcomes = _judge(bench, full, passes, [sets for draws in kept.values() for sets in draws])
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
        ways={
            **{
                key: _way_result(
                    [outcomes[sets] for sets in draws], len(own), known=bool(spellings), kept=_counts(draws)
                )
                for key, draws in kept.items()
            },
            **{
                key: _way_result(
                    [(one.gap, one.right)],
                    len(own),
                    known=bool(spellings),
                    kept=(one.visual_tokens,),
                    vision_flops=one.vision_flops,
                )
                for key, one in scaled_outcomes(bench, question, prompt, full, own, spellings).items()
            },
        },
        vision_flops=prompt_plan(bench.checkpoint, prompt).vision_flops,
    )


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
    passes: Sequence[tuple[list[int], FullPass]],
    kept: Sequence[KeptSets],
) -> dict[KeptSets, tuple[Gap, bool]]:
    """For everything kept: distance over the model's own answer, and whether a right answer is given."""
    gaps: dict[KeptSets, Gap] = {}
    right = dict.fromkeys(kept, False)
    own = [ids for ids, one in passes if one is full]
    for sets, log_probs in pruned_log_probs(bench.decoder, full, kept):
        gaps[sets] = gap(full.log_probs, log_probs)
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

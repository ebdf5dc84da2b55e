"""The rival nobody lists: the picture scaled down instead of pruned, where a smaller one has fewer tokens.

It costs nothing and saves the vision encoder too, so it is measured at two budgets: the same average number
of tokens as a pruned model sees, and the same FLOPs up to the first token, of which its encoder needs fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.families.picture_sizes import scaled_picture, scaled_size
from ep_export.first_token import first_token_flops, pixels_within, processor_settings, prompt_plan
from ep_export.measure.bench import shown_picture
from ep_export.measure.full_pass import run_full
from ep_export.measure.pruned import Gap, gap
from ep_export.measure.spelling import says
from ep_export.measure.ways import Scaling, Way
from ep_export.policy import Cut, Keep, MaxMin, Schedule

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.families.base import PromptInputs
    from ep_export.measure.bench import Bench
    from ep_export.measure.full_pass import FullPass
    from ep_export.measure.question import Question

__all__ = ["ScaledOutcome", "scaled_outcomes", "scaled_prompt"]

_AT_ONCE = Schedule((Cut(0, MaxMin()),))
"""A pruned model whose layers all see the average: what a scaled picture is to cost as much as."""


@dataclass(frozen=True)
class ScaledOutcome:
    """What one scaled picture comes to.

    Attributes:
        gap: Distance over the unpruned model's own answer.
        right: Whether a right answer is given.
        visual_tokens: Of the scaled picture.
        vision_flops: Of its vision encoder.
    """

    gap: Gap
    right: bool
    visual_tokens: int
    vision_flops: int


def scaled_outcomes(
    bench: Bench,
    question: Question,
    prompt: PromptInputs,
    full: FullPass,
    own: Sequence[int],
    spellings: Sequence[Sequence[int]],
) -> dict[str, ScaledOutcome]:
    """Ask the question of the unpruned model about smaller pictures.

    Args:
        bench: The setting.
        question: What is asked.
        prompt: Its prompt, with the picture as it is.
        full: The pass over that prompt and `own`.
        own: The model's own answer to it.
        spellings: Right answers; any counts.

    Returns:
        Way key -> outcome; ways for whose budget no size is small enough are left out.
    """
    outcomes: dict[str, ScaledOutcome] = {}
    for way in bench.setting.ways:
        smaller = scaled_prompt(bench, question, prompt, way) if way.scaling is not None else None
        if smaller is None:
            continue
        other = _pass(bench, smaller, own)
        outcomes[way.key] = ScaledOutcome(
            gap=gap(full.log_probs, other.log_probs),
            right=any(_right(bench, smaller, own, other, spellings)),
            visual_tokens=len(smaller.visual_index),
            vision_flops=prompt_plan(bench.checkpoint, smaller).vision_flops,
        )
    return outcomes


def scaled_prompt(bench: Bench, question: Question, prompt: PromptInputs, way: Way) -> PromptInputs | None:
    """The prompt about the picture in the largest size that a way's budget allows; None where none does.

    Raises:
        UserError: The picture cannot be read any more.
    """
    picture = shown_picture(bench, question)
    pixels = _pixels(bench, picture, prompt, way)
    if pixels is None:
        return None
    return bench.builder.build([scaled_picture(picture, pixels)], question.text)


def _pixels(bench: Bench, picture: Image.Image, prompt: PromptInputs, way: Way) -> int | None:
    checkpoint, visual = bench.checkpoint, len(prompt.visual_index)
    settings = processor_settings(checkpoint, checkpoint.path)
    if way.scaling is Scaling.FLOPS:
        return pixels_within(
            checkpoint,
            picture.size,
            first_token_flops(checkpoint, prompt, _AT_ONCE, way.keep),
            text_tokens=prompt.input_ids.shape[1] - visual,
            settings=settings,
        )
    most = _average_tokens(way.keep, visual)

    def fits(pixels: int) -> bool:
        size = scaled_size(picture.size, pixels)
        return checkpoint.family.picture_call(size, checkpoint.config, settings).visual_tokens <= most

    return _largest(fits, picture.width * picture.height)


def _average_tokens(keep: Keep, visual_tokens: int) -> float:
    return keep.ratio * visual_tokens if keep.ratio is not None else float(keep.tokens or 0)


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 1 to `most` that fits, where all smaller ones do; None where 1 does not."""
    if fits(most):
        return most
    if not fits(1):
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _pass(bench: Bench, prompt: PromptInputs, answer: Sequence[int]) -> FullPass:
    return run_full(bench.model, bench.checkpoint.family, prompt, answer, layers=())


def _right(
    bench: Bench,
    prompt: PromptInputs,
    own: Sequence[int],
    over_own: FullPass,
    spellings: Sequence[Sequence[int]],
) -> Iterator[bool]:
    """Of every right answer, whether greedy decoding gives it."""
    for ids in spellings:
        same = list(ids[:-1]) == list(own[:-1])
        passed = over_own if same else _pass(bench, prompt, ids)
        yield says(passed.log_probs, ids, bench.speller.end)

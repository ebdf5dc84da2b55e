"""One prompt through the bundle and through the oracle: everything the stages compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.adaptive import bounds
from ep_export.bundle import Component
from ep_export.choosers import CutTokens
from ep_export.planning import kept_tokens
from ep_export.reference import (
    Answer,
    PrefillStates,
    PruneSpec,
    capture,
    greedy_answer,
    kept_as,
)
from ep_export.validate.component_feeds import prune_feeds, rounded
from ep_export.validate.component_oracle import prune_tokens

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from ep_export.families.base import PromptInputs
    from ep_export.policy import Keep, Schedule
    from ep_export.runtime import Session
    from ep_export.runtime.generate import Generation
    from ep_export.runtime.prefill import Prefill
    from ep_export.validate.questions import Question

__all__ = ["Observation", "Oracle", "PruneRun", "observe"]


@dataclass(frozen=True)
class Oracle:
    """Hugging Face's model in float32, and in the graphs' type where that is another.

    Attributes:
        exact: The float32 model.
        half: The same weights in the graphs' half type; None for float32 graphs.
    """

    exact: PreTrainedModel
    half: PreTrainedModel | None


@dataclass(frozen=True)
class PruneRun:
    """A prune component alone, on what the oracle saw arrive at its cut.

    Attributes:
        component: The component.
        feeds: What it was given, rounded to its types.
        tokens: The same, as its chooser looks at it.
        outputs: What it computed of that.
    """

    component: Component
    feeds: dict[str, NDArray[Any]]
    tokens: CutTokens
    outputs: dict[str, NDArray[Any]]

    @property
    def kept(self) -> NDArray[np.int64]:
        """Visual tokens it keeps, as positions of the sequence it was given."""
        rows = self.outputs["kept_index"]
        return rows[np.isin(rows, self.feeds["visual_index"])]


@dataclass(frozen=True)
class Observation:
    """What both sides computed for one question.

    Attributes:
        question: The question.
        prompt: Its arrays, as the bundle's prompt builder makes them.
        budgets: For every cut the visual tokens that go on.
        got: The bundle's prefill.
        generation: The bundle's greedy answer.
        given: The oracle's prefill with the bundle's kept sets.
        half: As `given`, by the oracle in the graphs' half type.
        answer: The oracle's greedy answer with the bundle's kept sets.
        answer_text: The same as text.
        unpruned_text: The oracle's greedy answer with every visual token.
        forced: Whether `given` really has the bundle's kept sets; false when they are no valid ones.
        prunes: Every cut's prune component alone; none without visual tokens.
    """

    question: Question
    prompt: PromptInputs
    budgets: tuple[int, ...]
    got: Prefill
    generation: Generation
    given: PrefillStates
    half: PrefillStates | None
    answer: Answer
    answer_text: str
    unpruned_text: str
    forced: bool
    prunes: tuple[PruneRun, ...]

    def arrived(self, cut: int) -> NDArray[np.int64]:
        """Prompt positions that arrive at a cut in the bundle."""
        if cut == 0:
            return np.arange(self.prompt.input_ids.shape[1])
        return self.got.cuts[cut - 1].kept_index

    def kept_there(self, cut: int) -> NDArray[np.int64]:
        """Visual tokens that the bundle keeps at a cut, as positions of the sequence that arrives there."""
        arrived, kept = self.arrived(cut), self.got.cuts[cut].kept_index
        return np.flatnonzero(np.isin(arrived, kept) & np.isin(arrived, self.prompt.visual_index))


def observe(
    session: Session,
    oracle: Oracle,
    question: Question,
    pictures: Sequence[Image.Image],
    *,
    policies: Sequence[str],
    max_new_tokens: int,
) -> Observation:
    """Run both sides on one question.

    Raises:
        UserError: The prompt does not fit, or the bundle's keep is impossible.
    """
    manifest = session.bundle.manifest
    schedule = manifest.scheduled(policies)
    prompt = question.build(session.prompts, pictures)
    generation = session.generate(
        question.visuals(pictures), question.prompt, max_new_tokens=max_new_tokens, policies=policies
    )
    keep: Keep = generation.keep
    got = session.prefill(prompt, keep, policies)
    spec = PruneSpec(schedule, keep)
    kept = [cut.kept_index for cut in got.cuts]
    budgets = _budgets(keep, schedule, prompt, kept, manifest.dims.layers)
    forced = _valid(kept, prompt, budgets)
    select = kept_as(kept) if forced and kept else None
    given = capture(oracle.exact, prompt, spec, select=select)
    half = None
    if oracle.half is not None:
        # the half run must not choose by itself: its own near-ties are not the bundle's
        same = kept_as([trace.kept_index for trace in given.cuts])
        half = capture(oracle.half, prompt, spec, select=same)
    ask = partial(
        greedy_answer,
        oracle.exact,
        prompt,
        max_new_tokens,
        eos_token_ids=session.prompts.eos_token_ids,
        repetition_penalty=session.prompts.repetition_penalty,
    )
    answer = ask(plan=spec, select=select)
    unpruned = ask(plan=None) if given.cuts else answer
    prunes = tuple(
        _run_prune(session, manifest.prune(cut, settings.chooser.name), given, cut)
        for cut, settings in enumerate(schedule.cuts)
        if given.cuts
    )
    return Observation(
        question=question,
        prompt=prompt,
        budgets=budgets,
        got=got,
        generation=generation,
        given=given,
        half=half,
        answer=answer,
        answer_text=session.prompts.decode(answer.token_ids),
        unpruned_text=session.prompts.decode(unpruned.token_ids),
        forced=forced,
        prunes=prunes,
    )


def _run_prune(session: Session, component: Component, given: PrefillStates, cut: int) -> PruneRun:
    feeds = rounded(component, prune_feeds(component, given, cut))
    tokens = prune_tokens(component, session.bundle.manifest.dims, feeds)
    return PruneRun(component, feeds, tokens, session.run(component.name, feeds))


def _budgets(
    keep: Keep, schedule: Schedule, prompt: PromptInputs, kept: Sequence[NDArray[np.int64]], layers: int
) -> tuple[int, ...]:
    """Visual tokens that go on at every cut; where a prompt has its own keep, what the bundle decided.

    A token whose score is the threshold but for rounding may count on one side and not on the other: one
    number then serves both, and `stages` judges whether it is right.
    """
    visual = len(prompt.visual_index)
    if keep.threshold is None or not kept:
        return kept_tokens(keep, schedule, layers=layers, visual_tokens=visual)
    low, high = bounds(keep, schedule, layers=layers, visual_tokens=visual)
    count = int(np.isin(kept[0], prompt.visual_index).sum())
    return (min(max(count, low), high),)


def _valid(kept: Sequence[NDArray[np.int64]], prompt: PromptInputs, budgets: Sequence[int]) -> bool:
    """Whether the oracle can be made to keep this: all text, as many visual tokens as planned, in order."""
    if not len(prompt.visual_index):
        return not kept
    arrived = np.arange(prompt.input_ids.shape[1])
    text = np.setdiff1d(arrived, prompt.visual_index)
    for index, budget in zip(kept, budgets, strict=True):
        whole = np.isin(index, arrived).all() and np.isin(text, index).all()
        if not whole or len(index) != len(text) + budget or (np.diff(index) <= 0).any():
            return False
        arrived = index
    return True

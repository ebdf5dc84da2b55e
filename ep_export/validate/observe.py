"""One prompt through the bundle and through the oracle: everything the stages compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.plan import kept_tokens
from ep_export.reference import Answer, PrefillStates, Prunable, SelectTokens, capture, greedy_answer

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from ep_export.families.base import PromptInputs
    from ep_export.runtime import Session
    from ep_export.runtime.generate import Generation
    from ep_export.runtime.prefill import Prefill

__all__ = ["Observation", "Oracle", "Question", "observe"]


@dataclass(frozen=True)
class Question:
    """One prompt to validate with.

    Attributes:
        name: For the report.
        pictures: Numbers among the pictures given to `validate`, in prompt order.
        prompt: The question.
    """

    name: str
    pictures: tuple[int, ...]
    prompt: str


@dataclass(frozen=True)
class Oracle:
    """Hugging Face's model in float32, and in the graphs' type where that is another.

    Attributes:
        exact: The float32 model.
        half: The same weights in the graphs' half type; None for float32 graphs.
        plan: The bundle's policy and keep.
    """

    exact: PreTrainedModel
    half: PreTrainedModel | None
    plan: Prunable


@dataclass(frozen=True)
class Observation:
    """What both sides computed for one question.

    Attributes:
        question: The question.
        prompt: Its arrays, as the bundle's prompt builder makes them.
        k: Visual tokens to keep.
        got: The bundle's prefill.
        generation: The bundle's greedy answer.
        free: The oracle's prefill, choosing by itself.
        given: The oracle's prefill with the bundle's kept set.
        half: As `given`, by the oracle in the graphs' half type.
        answer: The oracle's greedy answer with the bundle's kept set.
        answer_text: The same as text.
        forced: Whether `given` really has the bundle's kept set; false when that set is no valid one.
    """

    question: Question
    prompt: PromptInputs
    k: int
    got: Prefill
    generation: Generation
    free: PrefillStates
    given: PrefillStates
    half: PrefillStates | None
    answer: Answer
    answer_text: str
    forced: bool

    @property
    def has_pictures(self) -> bool:
        """Whether anything was chosen."""
        return len(self.prompt.visual_index) > 0

    @property
    def kept_visual(self) -> NDArray[np.int64]:
        """Visual positions the bundle keeps."""
        return self.got.kept_index[np.isin(self.got.kept_index, self.prompt.visual_index)]

    @property
    def oracle_visual(self) -> NDArray[np.int64]:
        """Visual positions the oracle keeps by itself."""
        kept = self.free.kept_index.numpy()
        return kept[np.isin(kept, self.prompt.visual_index)]


def observe(
    session: Session, oracle: Oracle, question: Question, pictures: Sequence[Image.Image], max_new_tokens: int
) -> Observation:
    """Run both sides on one question.

    Raises:
        UserError: The prompt does not fit, or the bundle's keep is impossible.
    """
    shown = [pictures[i] for i in question.pictures]
    prompt = session.prompts.build(shown, question.prompt)
    got = session.prefill(prompt)
    generation = session.generate(shown, question.prompt, max_new_tokens=max_new_tokens)
    free = capture(oracle.exact, prompt, oracle.plan)
    same = np.array_equal(free.kept_index.numpy(), got.kept_index)
    forced = same or _valid(got.kept_index, free)
    select = None if same or not forced else _fixed(got.kept_index)
    given = free if select is None else capture(oracle.exact, prompt, oracle.plan, select=select)
    # the half run must not choose by itself: its own near-ties are not the bundle's
    half_select = _fixed(got.kept_index) if forced else _fixed(free.kept_index.numpy())
    half = capture(oracle.half, prompt, oracle.plan, select=half_select) if oracle.half is not None else None
    answer = greedy_answer(
        oracle.exact,
        prompt,
        max_new_tokens,
        plan=oracle.plan,
        select=select,
        eos_token_ids=session.prompts.eos_token_ids,
        repetition_penalty=session.prompts.repetition_penalty,
    )
    manifest = session.bundle.manifest
    k = kept_tokens(
        manifest.keep,
        layers=manifest.dims.layers,
        layer=manifest.policy.layer,
        visual_tokens=len(prompt.visual_index),
    )
    text = session.prompts.decode(answer.token_ids)
    return Observation(question, prompt, k, got, generation, free, given, half, answer, text, forced)


def _valid(kept_index: NDArray[np.int64], free: PrefillStates) -> bool:
    """Whether the oracle can be made to keep this: all text, as many visual tokens, in order."""
    own = free.kept_index.numpy()
    visual = free.visual_index.numpy()
    text = np.setdiff1d(own, visual)
    return (
        kept_index.shape == own.shape
        and bool(np.all(np.diff(kept_index) > 0))
        and np.array_equal(np.setdiff1d(kept_index, visual), text)
    )


def _fixed(kept_index: NDArray[np.int64]) -> SelectTokens:
    positions = torch.from_numpy(kept_index.copy())

    def select(_states: torch.Tensor, _k: int, visual_index: torch.Tensor) -> torch.Tensor:
        return visual_index[torch.isin(visual_index.cpu(), positions).to(visual_index.device)]

    return select

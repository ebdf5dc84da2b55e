"""How far pruned answers are those of the same bundle unpruned: its own spans are the reference, no torch.

For every question the bundle answers greedily without pruning. The pruned bundle is then led along that
answer, each token given to it whatever it would have said, and asked at every one of them what it would say
next. So one disagreement does not make everything after it a disagreement, and an answer that agrees at
every token is the answer the pruned bundle gives by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UsageError
from ep_export.progress import Progress, silent
from ep_export.runtime import open_picture
from ep_export.runtime.sampling import penalised

if TYPE_CHECKING:
    from ep_export.families.base import PromptInputs
    from ep_export.policy import Keep
    from ep_export.runtime import Prefill, Session

__all__ = ["Agreement", "Question", "measure_agreement"]

_STAGE = "comparing answers"


@dataclass(frozen=True)
class Question:
    """A question about a picture."""

    picture: Path
    text: str


@dataclass(frozen=True)
class Agreement:
    """A policy's answers against the unpruned ones.

    Attributes:
        questions: How many were asked.
        tokens: Of all unpruned answers together, the ones that end them included.
        exact: Share of the questions whose pruned answer is the unpruned one, token for token.
        top1: Share of the tokens of the unpruned answers that the pruned bundle prefers too, repetition
            penalty applied, given the tokens before it.
        kl: Mean over those tokens of KL(unpruned || pruned) of the next token, in nats, without the penalty.
    """

    questions: int
    tokens: int
    exact: float
    top1: float
    kl: float


@dataclass(frozen=True)
class _Answer:
    """An unpruned answer: its tokens, and the logits each was chosen from, [vocab_size] float32."""

    tokens: tuple[int, ...]
    logits: tuple[NDArray[np.float32], ...]


def measure_agreement(
    session: Session,
    questions: Sequence[Question],
    *,
    keep: Keep | None,
    policies: Sequence[Sequence[str]] = ((),),
    max_new_tokens: int,
    progress: Progress = silent,
) -> tuple[Agreement, ...]:
    """Compare policies on a bundle.

    Args:
        session: The opened bundle.
        questions: One picture each.
        keep: As an average over layers; the bundle's when None.
        policies: As `Session.generate` takes them; an empty one is the bundle's own.
        max_new_tokens: Of the unpruned answers; an end token ends them before.
        progress: Told about questions.

    Returns:
        One for each policy.

    Raises:
        UsageError: Nothing is asked.
        UserError: See `Session.prefill`.
    """
    if not questions:
        raise UsageError("nothing is asked", hint="give a folder with pictures")
    results: list[list[tuple[NDArray[np.bool_], NDArray[np.float64]]]] = [[] for _ in policies]
    progress(_STAGE, 0, len(questions))
    for number, question in enumerate(questions, 1):
        prompt = session.prompts.build([open_picture(question.picture)], question.text)
        answer = _unpruned(session, prompt, max_new_tokens)
        for names, own in zip(policies, results, strict=True):
            own.append(_compare(session, prompt, session.prefill(prompt, keep, names), answer))
        progress(_STAGE, number, len(questions))
    return tuple(map(_summary, results))


def _unpruned(session: Session, prompt: PromptInputs, max_new_tokens: int) -> _Answer:
    room = session.bundle.manifest.dims.max_positions - prompt.input_ids.shape[1] + 1
    state = session.continuation(session.prefill(prompt, prune=False))
    tokens: list[int] = []
    logits: list[NDArray[np.float32]] = []
    while True:
        logits.append(state.logits)
        tokens.append(_preferred(session, prompt, tokens, state.logits))
        if tokens[-1] in session.prompts.eos_token_ids or len(tokens) == min(max_new_tokens, room):
            return _Answer(tuple(tokens), tuple(logits))
        state.feed(tokens[-1])


def _compare(
    session: Session, prompt: PromptInputs, prefill: Prefill, answer: _Answer
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """For every token of an answer whether it is preferred here too, and the KL divergence to here."""
    state = session.continuation(prefill)
    same, divergence = [], []
    for place, (token, logits) in enumerate(zip(answer.tokens, answer.logits, strict=True)):
        if place:
            state.feed(answer.tokens[place - 1])
        same.append(_preferred(session, prompt, answer.tokens[:place], state.logits) == token)
        divergence.append(_kl(logits, state.logits))
    return np.array(same), np.array(divergence)


def _preferred(
    session: Session, prompt: PromptInputs, tokens: Sequence[int], logits: NDArray[np.float32]
) -> int:
    """The greedy choice after these tokens, as `generate` makes it."""
    seen = sorted({*prompt.input_ids[0].tolist(), *tokens})
    return int(penalised(logits, seen, session.prompts.repetition_penalty).argmax())


def _kl(full: NDArray[np.float32], pruned: NDArray[np.float32]) -> float:
    """KL(full || pruned) of two rows of logits, in nats."""
    log_full, log_pruned = _log_softmax(full), _log_softmax(pruned)
    return float(np.sum(np.exp(log_full) * (log_full - log_pruned)))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normalised


def _summary(results: Sequence[tuple[NDArray[np.bool_], NDArray[np.float64]]]) -> Agreement:
    same = np.concatenate([same for same, _ in results])
    return Agreement(
        questions=len(results),
        tokens=len(same),
        exact=float(np.mean([same.all() for same, _ in results])),
        top1=float(same.mean()),
        kl=float(np.mean(np.concatenate([divergence for _, divergence in results]))),
    )

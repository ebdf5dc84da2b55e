"""What goes into the engine and what comes out: frozen, so that threads may share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ep_export.errors import UsageError, UserError
from ep_export.families.base import Turn, Visual
from ep_export.policy import Keep
from ep_export.runtime.generate import AnswerCut, Finish
from ep_export.runtime.kept import KeptPicture
from ep_export.runtime.sampling import Sampling

__all__ = ["Answer", "EngineClosed", "EngineFull", "EngineStats", "PromptReport", "Request"]


class EngineFull(UserError):  # noqa: N818 - a state of the engine, as queue.Full
    """As many requests wait as may; the same request may be sent again later."""


class EngineClosed(UserError):  # noqa: N818 - likewise
    """The engine takes no more requests."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question about pictures and videos, or about none; or a conversation to go on with.

    Attributes:
        question: The text.
        visuals: Pictures and videos in prompt order, before the question.
        turns: A conversation, in place of question and visuals.
        keep: Amount kept, a ratio or a number of tokens; the bundle's when None.
        policies: Which of the bundle's policies; see `Manifest.scheduled`.
        prune: False runs the spans alone: the unpruned model.
        sampling: How to draw tokens; greedy when None.
        max_new_tokens: Longest answer in tokens.
        stop: Texts that end the answer, which is given without them.

    Raises:
        UsageError: No token may be generated, a stop text is empty, or there are both question and turns.
    """

    question: str = ""
    visuals: tuple[Visual, ...] = ()
    turns: tuple[Turn, ...] = ()
    keep: Keep | None = None
    policies: tuple[str, ...] = ()
    prune: bool = True
    sampling: Sampling | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max-new-tokens is {self.max_new_tokens}, expected 1 or more")
        if not all(self.stop):
            raise UsageError("a stop text is empty", hint="leave it out")
        if self.turns and (self.question or self.visuals):
            raise UsageError(
                "request has both a question and turns", hint="make the question the last of the turns"
            )

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """The turns: those given, or the question as the only one."""
        return self.turns or (Turn("user", (*self.visuals, self.question)),)


@dataclass(frozen=True)
class PromptReport:
    """What became of a prompt, known before the first piece of text.

    Attributes:
        prompt_tokens: S.
        visual_tokens: N.
        kept_visual_tokens: For every cut the visual tokens that go on; empty where nothing was pruned.
        kept_index: [M] prompt positions that reach the last span.
        cuts: Every cut the prompt went through.
        policies: Names of the choosers in use, cut by cut.
        keep: The amount kept that was asked for.
        pictures: What was kept of each picture.
        cache_bytes: Keys and values reserved for prompt and answer, over all spans.
    """

    prompt_tokens: int
    visual_tokens: int
    kept_visual_tokens: tuple[int, ...]
    kept_index: tuple[int, ...]
    cuts: tuple[AnswerCut, ...]
    policies: tuple[str, ...]
    keep: Keep
    pictures: tuple[KeptPicture, ...]
    cache_bytes: int


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: The whole text, equal to the stream's pieces put together.
        token_ids: Generated ids, those that ended the answer included.
        finish: Why it ended.
        prompt: What became of the prompt; None where the request was cancelled while it waited.
        timings_ms: queued (submission to the start of preparing), prepare, prefill (vision encoder
            included), first_token (submission to the first token), decode (first token to the last, steps
            shared with other requests), total.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    prompt: PromptReport | None
    timings_ms: Mapping[str, float]


@dataclass(frozen=True)
class EngineStats:
    """The engine's counters at one moment; those that only grow are over its whole life.

    Attributes:
        submitted: Requests taken.
        refused: Requests refused because as many waited as may (`EngineFull`).
        failed: Requests that ended with an error of their own.
        finished: Answers by `Finish` value.
        prompt_tokens: Of all prompts that were prefilled.
        generated_tokens: Of all answers.
        visual_tokens: Of all prompts that were prefilled.
        kept_visual_tokens: Of them, those that reach the last span.
        first_tokens: Answers that have a first token.
        first_token_seconds: From submission to the first token, all answers together.
        decode_steps: Batched steps.
        waiting: Requests in the queue now.
        waiting_limit: As many as may wait.
        slots_in_use: Requests being answered now.
        slots: As many as can be.
        cache_rows_in_use: Rows of the longest span reserved now.
        cache_bytes_in_use: Keys and values reserved now, in bytes.
        cache_bytes: As many as all slots have.
    """

    submitted: int = 0
    refused: int = 0
    failed: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    visual_tokens: int = 0
    kept_visual_tokens: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    decode_steps: int = 0
    waiting: int = 0
    waiting_limit: int = 0
    slots_in_use: int = 0
    slots: int = 0
    cache_rows_in_use: int = 0
    cache_bytes_in_use: int = 0
    cache_bytes: int = 0

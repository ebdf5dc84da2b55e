"""One request on its way: waiting, then prefilled, then a token after every step. For the engine's thread."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ep_export.errors import UserError
from ep_export.families.base import PromptInputs
from ep_export.planning import kept_tokens
from ep_export.runtime.generate import AnswerCut, Finish
from ep_export.runtime.kept import kept_pictures
from ep_export.runtime.sampling import TokenChooser
from ep_export.serving.answer_text import AnswerText
from ep_export.serving.cache_memory import CacheNeed, cache_need
from ep_export.serving.requests import Answer, PromptReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ep_export.policy import Keep, Schedule
    from ep_export.runtime.prefill import Prefill
    from ep_export.runtime.session import Session
    from ep_export.serving.stream import Stream

__all__ = ["Prepared", "Running", "Waiting", "cancelled_answer", "prepare"]


@dataclass
class Waiting:
    """A request in the queue.

    Attributes:
        stream: Where its answer goes.
        schedule: What prunes it; None for the unpruned model.
        keep: Amount kept.
        submitted: `time.perf_counter()` then.
    """

    stream: Stream
    schedule: Schedule | None
    keep: Keep
    submitted: float


@dataclass(frozen=True)
class Prepared:
    """A request whose prompt is ready.

    Attributes:
        prompt: Its arrays.
        need: Cache it will take at most.
        limit: Most tokens of its answer: what was asked for, or what context and slot have room for.
        began: `time.perf_counter()` when preparing began.
        prepare_ms: How long that took.
    """

    prompt: PromptInputs
    need: CacheNeed
    limit: int
    began: float
    prepare_ms: float


def prepare(session: Session, waiting: Waiting, capacity: Sequence[int]) -> Prepared:
    """Pictures and question as arrays, and what they need.

    Args:
        session: The opened bundle.
        waiting: The request.
        capacity: Cache rows a slot has, one number a span.

    Raises:
        UserError: A picture or the text is at fault, or the prompt fits no slot.
    """
    began, request, manifest = time.perf_counter(), waiting.stream.request, session.bundle.manifest
    prompt = session.prompts.build_chat(request.conversation)
    length, visual = prompt.input_ids.shape[1], prompt.visual_index.shape[0]
    schedule = waiting.schedule if visual else None
    layers = manifest.dims.layers
    kept = (
        kept_tokens(waiting.keep.largest, schedule, layers=layers, visual_tokens=visual) if schedule else ()
    )
    need = partial(cache_need, manifest, schedule, prompt_tokens=length, visual_tokens=visual, kept=kept)
    room = [manifest.dims.max_positions - length]
    for span, rows, most in zip(manifest.spans, need(max_new_tokens=1).rows, capacity, strict=True):
        if rows > most:
            raise UserError(
                f"prompt of {length} tokens needs {rows} cache rows in {span.name}, a slot has {most}",
                hint="give fewer or smaller pictures, keep fewer tokens, or serve with a larger capacity",
            )
        room.append(most - rows)
    limit = max(1, min(request.max_new_tokens, min(room) + 1))  # the last token is never fed back
    return Prepared(prompt, need(max_new_tokens=limit), limit, began, 1e3 * (time.perf_counter() - began))


def cancelled_answer(waiting: Waiting) -> Answer:
    """Of a request that was given up before its prompt was run."""
    total = 1e3 * (time.perf_counter() - waiting.submitted)
    return Answer("", (), Finish.CANCELLED, None, {"queued": total, "total": total})


class Running:
    """A request that has been prefilled.

    Args:
        session: The opened bundle.
        waiting: The request.
        prepared: Its prompt.
        prefill: What prefill gave.
        prefill_ms: How long it took.

    Attributes:
        stream: Where the answer goes.
        need: Cache reserved for it.
        report: What became of the prompt.
        tokens: Generated so far.
    """

    def __init__(
        self, session: Session, waiting: Waiting, prepared: Prepared, prefill: Prefill, prefill_ms: float
    ) -> None:
        request, prompts = waiting.stream.request, session.prompts
        self.stream = waiting.stream
        self.need = prepared.need
        self.report = _report(waiting, prepared, prefill)
        self.tokens: list[int] = []
        self._bounded = prepared.limit < request.max_new_tokens
        self._limit = prepared.limit
        self._ends = prompts.eos_token_ids
        self._chooser = TokenChooser(
            prepared.prompt.input_ids[0].tolist(),
            repetition_penalty=prompts.repetition_penalty,
            sampling=request.sampling,
        )
        self._text = AnswerText(prompts.decode, request.stop)
        self._submitted, self._first = waiting.submitted, 0.0
        self._timings = {
            "queued": 1e3 * (prepared.began - waiting.submitted),
            "prepare": prepared.prepare_ms,
            "prefill": prefill_ms,
        }

    def take(self, logits: NDArray[np.float32]) -> Finish | None:
        """Choose the next token, give its text to the stream; why the answer ends, or None.

        Args:
            logits: [vocab_size] float32.
        """
        token = self._chooser.choose(logits)
        self.tokens.append(token)
        if len(self.tokens) == 1:
            self._first = time.perf_counter()
        self.stream.put(self._text.push(token))
        if self._text.stopped:
            return Finish.STOP
        if token in self._ends:
            return Finish.END
        if len(self.tokens) == self._limit:
            return Finish.CONTEXT if self._bounded else Finish.LENGTH
        return None

    @property
    def first_token_seconds(self) -> float:
        """From submission to the first token."""
        return self._first - self._submitted

    def end(self, finish: Finish) -> Answer:
        """The answer, its last piece of text given to the stream."""
        self.stream.put(self._text.end())
        now = time.perf_counter()
        if self.tokens:
            self._timings["first_token"] = 1e3 * self.first_token_seconds
            self._timings["decode"] = 1e3 * (now - self._first)
        self._timings["total"] = 1e3 * (now - self._submitted)
        return Answer(self._text.text, tuple(self.tokens), finish, self.report, self._timings)


def _report(waiting: Waiting, prepared: Prepared, prefill: Prefill) -> PromptReport:
    prompt, schedule = prepared.prompt, waiting.schedule
    length, visual = prompt.input_ids.shape[1], prompt.visual_index.shape[0]
    text_tokens = length - visual
    return PromptReport(
        prompt_tokens=length,
        visual_tokens=visual,
        kept_visual_tokens=tuple(cut.kept_index.shape[0] - text_tokens for cut in prefill.cuts),
        kept_index=tuple(prefill.kept_index.tolist()),
        cuts=tuple(AnswerCut(cut.layer, cut.policy, tuple(cut.kept_index.tolist())) for cut in prefill.cuts),
        policies=tuple(cut.chooser.name for cut in schedule.cuts) if schedule else (),
        keep=waiting.keep,
        pictures=kept_pictures(prompt, [cut.kept_index for cut in prefill.cuts]),
        cache_bytes=prepared.need.bytes,
    )

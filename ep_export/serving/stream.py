"""An answer as it comes: pieces of text that any thread, or any asyncio loop, may read.

The engine's thread only ever appends and wakes: a reader that sleeps or has gone holds nobody up, and what is
kept for it is bounded by the longest answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

from ep_export.serving.requests import Answer, PromptReport, Request

__all__ = ["Stream"]


class Stream:
    """One request's answer. Iterate over it, with `for` or `async for`, for pieces of text.

    Every iteration begins at the first piece. An answer that fails raises its error there and in `answer`.

    Args:
        request: What was asked.
        cancel: Called once with this stream when nobody wants the answer any more.

    Attributes:
        request: What was asked.
    """

    def __init__(self, request: Request, cancel: Callable[[Stream], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._changed = threading.Condition()
        self._ended = threading.Event()  # whoever wants the whole answer is not woken for every piece
        self._pieces: list[str] = []
        self._prompt: PromptReport | None = None
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._listeners: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they come.

        Raises:
            UserError: The request's own fault: a bad picture, too long a prompt.
        """
        position = 0
        while True:
            with self._changed:
                self._changed.wait_for(partial(self._ready, position))
                if position == len(self._pieces):
                    break
                piece = self._pieces[position]
            position += 1
            yield piece
        self._raise()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Pieces of text as they come; errors as in `__iter__`."""
        loop, wake = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(wake.set)

        with self._changed:
            self._listeners.append(notify)
        try:
            position = 0
            while True:
                wake.clear()
                with self._changed:
                    pieces, done = self._pieces[position:], self.done
                for piece in pieces:
                    yield piece
                position += len(pieces)
                if done:
                    break
                await wake.wait()
        finally:
            with self._changed:
                self._listeners.remove(notify)
        self._raise()

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self._ended.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called before the end."""
        return self._cancelled

    @property
    def prompt(self) -> PromptReport | None:
        """What became of the prompt; None until just before the first piece."""
        return self._prompt

    @property
    def answer(self) -> Answer:
        """The whole answer; waits for its end.

        Raises:
            UserError: As in `__iter__`.
        """
        self._ended.wait()
        self._raise()
        assert self._answer is not None  # noqa: S101 - or there was an error
        return self._answer

    def cancel(self) -> None:
        """Give the answer up; what came so far stays. Any thread, any number of times, also after the end."""
        with self._changed:
            first = not (self._cancelled or self.done)
            self._cancelled = self._cancelled or first
        if first:
            self._cancel(self)

    def put_prompt(self, prompt: PromptReport) -> None:
        """For the engine: the prompt went through."""
        self._prompt = prompt

    def put(self, piece: str) -> None:
        """For the engine: more text."""
        if piece:
            self._change(lambda: self._pieces.append(piece))

    def finish(self, answer: Answer) -> None:
        """For the engine: the end."""
        self._answer = answer
        self._change(self._ended.set)

    def fail(self, error: BaseException) -> None:
        """For the engine: the end, by an error."""
        self._error = error
        self._change(self._ended.set)

    def _change(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for notify in listeners:
            notify()

    def _ready(self, position: int) -> bool:
        return self.done or position < len(self._pieces)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

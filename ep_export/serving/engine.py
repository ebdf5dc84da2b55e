"""Continuous batching: requests come and go between decode steps, each with its own pictures and kept tokens.

One thread owns the bundle. Between two steps it admits at most one request (pictures, prefill), so that those
that run wait for one prefill at most; then all of them get their next token in one step. Requests are
admitted in the order they came, each into a slot with cache for its longest answer: what was begun is never
cut short for lack of memory, and nobody waits behind later ones.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from operator import mul

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Manifest
from ep_export.errors import UsageError, reason
from ep_export.planning import check_keep, check_schedule
from ep_export.policy import Keep, Schedule
from ep_export.runtime.generate import Finish
from ep_export.runtime.session import Session
from ep_export.serving.cache_memory import row_bytes
from ep_export.serving.counters import Counters
from ep_export.serving.requests import Answer, EngineClosed, EngineFull, EngineStats, Request
from ep_export.serving.running import Prepared, Running, Waiting, cancelled_answer, prepare
from ep_export.serving.stream import Stream

__all__ = ["Engine"]

_DEFAULT_SLOTS = 8
_DEFAULT_CAPACITY = 4096
"""Cache rows of a slot when nothing is said: a large picture, a question and a long answer."""


class Engine:
    """Answers many requests at once. Use as a context manager, or call `close`; any thread may submit.

    While it is open nobody else may run the session.

    Args:
        session: The opened bundle; closing the engine leaves it open.
        slots: Requests answered at once at most; when None 8, or fewer where engines were compiled for fewer.
        capacity: Cache rows of a slot: in every span, or one number for each, less behind a cut; `cache_need`
            says how many a request takes. The model's context or 4096, whichever is less, when None.
        waiting: Requests that may wait.

    Attributes:
        slots: As above.
        capacity: Cache rows of a slot, one number a span.
        waiting_limit: Requests that may wait.

    Raises:
        UsageError: A number is below 1, or `capacity` has not one for every span.
        UserError: There are more slots than engines were compiled for.
    """

    def __init__(
        self,
        session: Session,
        *,
        slots: int | None = None,
        capacity: int | Sequence[int] | None = None,
        waiting: int = 64,
    ) -> None:
        if slots is None:
            slots = min(_DEFAULT_SLOTS, session.max_batch or _DEFAULT_SLOTS)
        self.slots = slots
        self.capacity = _capacity(session.bundle.manifest, capacity)
        self.waiting_limit = waiting
        if min(slots, waiting, *self.capacity) < 1:
            raise UsageError(
                f"engine has {slots} slots of {min(self.capacity)} cache rows and {waiting} places to wait, "
                "expected 1 or more of each"
            )
        self._session = session
        self._decoder = session.decoder(slots=slots, capacity=self.capacity)
        self.capacity = self._decoder.capacity
        self._counters = Counters()
        # Below: changed under this lock only. The thread alone fills and empties slots.
        self._changed = threading.Condition()
        self._waiting: deque[Waiting] = deque()
        self._running: dict[int, Running] = {}
        self._live: set[Stream] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ep-export-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.close(drain=kind is None)

    def submit(self, request: Request) -> Stream:
        """Queue a request.

        Returns:
            Its answer as it comes. Faults of its pictures and its prompt are raised there.

        Raises:
            EngineFull: As many requests wait as may.
            EngineClosed: The engine was closed.
            UserError: The bundle has no such policy, or `keep` is impossible.
        """
        schedule, keep = self._settle(request)
        stream = Stream(request, self._cancelled)
        with self._changed:
            if self._closed:
                raise EngineClosed("the engine is closed", hint="send the request to another one")
            if len(self._waiting) >= self.waiting_limit:
                self._counters.add(refused=1)
                raise EngineFull(
                    f"{len(self._waiting)} requests wait already, as many as may",
                    hint="send it again later",
                )
            self._waiting.append(Waiting(stream, schedule, keep, time.perf_counter()))
            self._live.add(stream)
            self._counters.add(submitted=1)
            self._changed.notify_all()
        return stream

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken: `close` was called, or the engine's thread failed."""
        return self._closed

    def stats(self) -> EngineStats:
        """Counters and gauges now."""
        with self._changed:
            return self._counters.snapshot(
                waiting=len(self._waiting),
                waiting_limit=self.waiting_limit,
                slots_in_use=len(self._running),
                slots=self.slots,
                cache_rows_in_use=sum(max(running.need.rows) for running in self._running.values()),
                cache_bytes_in_use=sum(running.need.bytes for running in self._running.values()),
                cache_bytes=self.slots
                * sum(map(mul, self.capacity, row_bytes(self._session.bundle.manifest))),
            )

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests and wait for the end; may be called again, also while it waits.

        Args:
            drain: Finish every answer that was promised; False cancels them all.
        """
        with self._changed:
            self._closed = True
            streams = () if drain else tuple(self._live)
            self._changed.notify_all()
        for stream in streams:
            stream.cancel()
        self._thread.join()

    def _settle(self, request: Request) -> tuple[Schedule | None, Keep]:
        manifest = self._session.bundle.manifest
        schedule = manifest.pruned_to(request.keep, request.policies) if request.prune else None
        if schedule is None:
            return None, Keep(ratio=1.0)
        check_schedule(schedule, manifest.dims.layers)
        keep = request.keep or manifest.keep_for(schedule)
        check_keep(keep)
        return schedule, keep

    def _cancelled(self, stream: Stream) -> None:
        """A stream was cancelled: out of the queue at once, out of its slot before the next step."""
        with self._changed:
            waiting = next((item for item in self._waiting if item.stream is stream), None)
            if waiting is not None:
                self._waiting.remove(waiting)
            self._changed.notify_all()
        if waiting is not None:
            self._finish(stream, cancelled_answer(waiting))

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._admit()
                self._step()
        except BaseException as error:  # noqa: BLE001 - whoever waits for an answer must not wait for ever
            with self._changed:
                self._closed = True
                streams = tuple(self._live)
                self._waiting.clear()
                self._running.clear()
            for stream in streams:
                ended = EngineClosed(f"the engine stopped: {reason(error)}", hint="open another one")
                ended.__cause__ = error
                self._fail(stream, ended)

    def _wait(self) -> bool:
        """Until there is something to do; false when the engine is closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            return bool(self._waiting or self._running)

    def _drop_cancelled(self) -> None:
        for slot, running in tuple(self._running.items()):
            if running.stream.cancelled:
                self._leave(slot, Finish.CANCELLED)

    def _admit(self) -> None:
        """Prefill the request at the head of the queue, if a slot is free."""
        with self._changed:
            if not self._waiting or len(self._running) == self.slots:
                return
            head = self._waiting.popleft()
        try:
            prepared = prepare(self._session, head, self.capacity)
            if head.stream.cancelled:
                self._finish(head.stream, cancelled_answer(head))
            else:
                self._prefill(head, prepared)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone
            self._fail(head.stream, error)

    def _prefill(self, head: Waiting, prepared: Prepared) -> None:
        start, request = time.perf_counter(), head.stream.request
        prefill = self._session.prefill(prepared.prompt, head.keep, request.policies, prune=request.prune)
        running = Running(self._session, head, prepared, prefill, 1e3 * (time.perf_counter() - start))
        slot = min(set(range(self.slots)) - set(self._running))
        self._decoder.admit(slot, prefill)
        report = running.report
        head.stream.put_prompt(report)
        self._counters.add(
            prompt_tokens=report.prompt_tokens,
            visual_tokens=report.visual_tokens,
            kept_visual_tokens=(report.kept_visual_tokens or (report.visual_tokens,))[-1],
        )
        with self._changed:
            self._running[slot] = running
        self._take(slot, prefill.logits)

    def _step(self) -> None:
        """The next token of every running answer."""
        if not self._running:
            return
        tokens = {slot: running.tokens[-1] for slot, running in self._running.items()}
        try:
            logits = self._decoder.step(tokens)
        except Exception as error:  # noqa: BLE001 - a step that fails fails for all it was for
            for slot in tokens:
                self._drop(slot, error)
            return
        self._counters.add(decode_steps=1)
        for slot, row in logits.items():
            self._take(slot, row)

    def _take(self, slot: int, logits: NDArray[np.float32]) -> None:
        running = self._running[slot]
        try:
            finish = running.take(logits)
        except Exception as error:  # noqa: BLE001 - of one answer alone
            self._drop(slot, error)
            return
        self._counters.add(generated_tokens=1)
        if len(running.tokens) == 1:
            self._counters.add_first_token(running.first_token_seconds)
        if finish is not None:
            self._leave(slot, finish)

    def _leave(self, slot: int, finish: Finish) -> None:
        """An answer is complete; its slot is free before its reader hears of it."""
        running = self._release(slot)
        try:
            answer = running.end(finish)
        except Exception as error:  # noqa: BLE001 - likewise
            self._fail(running.stream, error)
        else:
            self._finish(running.stream, answer)

    def _drop(self, slot: int, error: BaseException) -> None:
        self._fail(self._release(slot).stream, error)

    def _release(self, slot: int) -> Running:
        self._decoder.release(slot)
        with self._changed:
            return self._running.pop(slot)

    def _finish(self, stream: Stream, answer: Answer) -> None:
        if self._ends(stream):
            self._counters.add_finished(answer.finish)
            stream.finish(answer)

    def _fail(self, stream: Stream, error: BaseException) -> None:
        if self._ends(stream):
            self._counters.add(failed=1)
            stream.fail(error)

    def _ends(self, stream: Stream) -> bool:
        """Whether this is the one end of a stream: a request may fail while it is cancelled."""
        with self._changed:
            first = stream in self._live
            self._live.discard(stream)
            return first


def _capacity(manifest: Manifest, capacity: int | Sequence[int] | None) -> tuple[int, ...]:
    """Cache rows of a slot, one number a span."""
    spans = len(manifest.spans)
    if capacity is None:
        capacity = min(manifest.dims.max_positions, _DEFAULT_CAPACITY)
    rows = (capacity,) * spans if isinstance(capacity, int) else tuple(capacity)
    if len(rows) != spans:
        raise UsageError(f"capacity has {len(rows)} numbers, the bundle has {spans} spans")
    return rows

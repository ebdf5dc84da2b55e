"""`/v1/chat/completions`: a request to the engine and its answer back, whole or as server-sent events.

An answer belongs to its connection: when the client leaves, or takes too long, its request is cancelled. The
status is known before the first byte is sent, because the first piece of text is waited for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from starlette.responses import JSONResponse

from ep_export.runtime.generate import Finish
from ep_export.serve.answers import Reply
from ep_export.serve.api_error import ApiError, as_api_error
from ep_export.serve.budget import Budget, Share
from ep_export.serve.chat_request import ChatRequest, parse_request
from ep_export.serve.pictures import Conversations
from ep_export.serving import Request

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from ep_export.bundle import Manifest
    from ep_export.serve.limits import Limits
    from ep_export.serving import Engine, Stream

__all__ = ["ChatCompletions"]

_LOG = logging.getLogger(__name__)
_SEND_SECONDS = 30.0  # for a client to make room for one event
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect what should be seen at once
]


class ChatCompletions:
    """The endpoint, an ASGI application.

    Args:
        engine: Answers.
        manifest: The bundle's.
        name: Of the model, as requests must give it.
        limits: Of requests.
    """

    def __init__(self, engine: Engine, manifest: Manifest, *, name: str, limits: Limits) -> None:
        self._engine, self._manifest, self._name, self._limits = engine, manifest, name, limits
        self._conversations = Conversations(limits)
        self._budget = Budget(limits.held_bytes)
        self._streams: set[Stream] = set()
        self._open = 0
        self._stopping = False

    def stop(self) -> None:
        """End every answer under way, and those to come: each gets a last event that says so."""
        self._stopping = True
        for stream in tuple(self._streams):
            stream.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ApiError: It is refused; nothing was sent yet.
        """
        with Share(self._budget) as share:
            try:
                body = await read_body(scope, receive, self._limits, share)
            except ApiError as error:
                error.headers["Connection"] = "close"  # the rest may still come, and nobody reads it
                raise
            if self._open >= self._limits.requests:  # a request counts once it is there
                told = f"{self._open} requests are open already"
                raise ApiError(429, told, code="server_full", retry_after=1)
            self._open += 1
            try:
                await self._answer(body, share, scope, receive, send)
            finally:
                self._open -= 1

    async def _answer(self, body: bytes, share: Share, scope: Scope, receive: Receive, send: Send) -> None:
        request = await anyio.to_thread.run_sync(parse_request, body)
        if request.model != self._name:
            told = f"there is no model {request.model!r}, this server has {self._name!r}"
            raise ApiError(404, told, param="model", code="model_not_found")
        await _while_connected(receive, partial(self._respond, request, share, scope, receive, send))

    async def _respond(
        self, request: ChatRequest, share: Share, scope: Scope, receive: Receive, send: Send
    ) -> None:
        streaming = False
        with anyio.move_on_after(self._limits.seconds) as within:
            turns = await self._conversations.turns(request.messages, share)
            stream = self._engine.submit(
                Request(
                    turns=turns,
                    keep=request.amount,
                    policies=request.policy,
                    prune=request.prune,
                    sampling=request.sampling,
                    max_new_tokens=request.longest(self._limits.new_tokens),
                    stop=request.stop,
                )
            )
            self._streams.add(stream)
            if self._stopping:
                stream.cancel()
            try:
                async with aclosing(_pieces(stream)) as pieces:
                    first = await anext(pieces, "")
                    self._refuse_cancelled(stream)
                    reply = Reply(self._name, self._manifest)
                    if request.stream:
                        streaming = True
                        with suppress(_UnreadError):  # uvicorn closes a response that is not complete
                            await self._send_events(request, reply, first, pieces, stream, send)
                        return
                    async for _ in pieces:
                        pass
                    self._refuse_cancelled(stream)
                await JSONResponse(reply.whole(stream.answer))(scope, receive, send)
            finally:
                stream.cancel()
                self._streams.discard(stream)
        if within.cancelled_caught and not streaming:
            raise self._too_long()

    async def _send_events(
        self,
        request: ChatRequest,
        reply: Reply,
        first: str,
        pieces: AsyncIterator[str],
        stream: Stream,
        send: Send,
    ) -> None:
        """A stream of events, which ends with `[DONE]` whatever happens on the way."""
        await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        try:
            await _send_event(send, reply.first_chunk())
            if first:
                await _send_event(send, reply.text_chunk(first))
            async for piece in pieces:
                await _send_event(send, reply.text_chunk(piece))
            self._refuse_cancelled(stream)
            await _send_event(send, reply.last_chunk(stream.answer))
            if request.stream_options and request.stream_options.include_usage:
                await _send_event(send, reply.usage_chunk(stream.answer))
        except _UnreadError:
            raise
        except Exception as error:  # noqa: BLE001 - too late for a status: it is said in the stream
            if not isinstance(error, ApiError):
                _LOG.exception("an answer failed")
            await _send_event(send, as_api_error(error).body)
        except anyio.get_cancelled_exc_class():
            # out of time, or the client has gone: then this is sent to nobody
            with anyio.move_on_after(1, shield=True):
                await _send_event(send, self._too_long().body)
                await _send_end(send)
            raise
        await _send_end(send)

    def _refuse_cancelled(self, stream: Stream) -> None:
        """Raise where an answer was given up by the server itself."""
        if stream.done and stream.answer.finish is Finish.CANCELLED:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)

    def _too_long(self) -> ApiError:
        told = f"the answer took longer than {self._limits.seconds:g} seconds"
        return ApiError(504, told, code="timeout")


async def read_body(scope: Scope, receive: Receive, limits: Limits, share: Share) -> bytes:
    """A JSON request's body.

    Raises:
        ApiError: Not declared as JSON, too large, too slow, no memory for it, or the client left.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":  # and so no other site's page can send one without asking first
        raise ApiError(415, "the body must come with Content-Type: application/json", code="not_json")
    declared = headers.get(b"content-length", b"0")
    body = bytearray()
    try:
        with anyio.fail_after(limits.body_seconds):
            more = True
            while more:
                if len(body) > limits.body_bytes or int(declared) > limits.body_bytes:
                    told = f"the body has more than {limits.body_bytes} bytes"
                    raise ApiError(413, told, code="body_too_large")
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client left", code="client_left")
                share.take(len(message.get("body", b"")))
                body += message.get("body", b"")
                more = message.get("more_body", False)
    except TimeoutError as error:
        told = f"the body did not come within {limits.body_seconds:g} seconds"
        raise ApiError(408, told, code="body_too_slow") from error
    return bytes(body)


async def _while_connected(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Do something for a client, and stop as soon as it leaves."""
    failed: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - raised outside of the group, which would wrap it
            failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed


async def _pieces(stream: Stream) -> AsyncGenerator[str]:
    """Pieces of text; a generator, which can be closed."""
    async for piece in stream:
        yield piece


class _UnreadError(Exception):
    """The client takes nothing any more."""


async def _send_event(send: Send, event: dict[str, Any]) -> None:
    data = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    await _send(send, {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _send_end(send: Send) -> None:
    await _send(send, {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _send(send: Send, message: dict[str, Any]) -> None:
    try:
        with anyio.fail_after(_SEND_SECONDS):
            await send(message)
    except TimeoutError as error:
        raise _UnreadError from error

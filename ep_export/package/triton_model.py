"""The model inside Triton's Python backend: questions and pictures in, text out, many at once.

Triton hands requests over as they come and does not wait: `execute` puts them into the engine object of
`ep_export.serving`, which answers them in one batch, and a thread of its own sends each what it gets, through
the request's own sender, until the last response of each.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ep_export.bundle import Bundle, read_manifest
from ep_export.errors import UserError, reason
from ep_export.package.triton_inputs import RequestInputs, server
from ep_export.runtime import Session
from ep_export.runtime.backends import Runtime, choose_backend
from ep_export.runtime.generate import Finish
from ep_export.serving import Engine, EngineClosed, EngineFull, Request

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ep_export.serving import Answer, Stream

__all__ = ["BUNDLE", "FrontModel"]

BUNDLE = "bundle"
"""Folder of the bundle, beside model.py."""

_LOG = logging.getLogger(__name__)  # the server's log has what Python says on stderr
_MAX_NEW_TOKENS = 128
_LOOK_SECONDS = 0.1  # between looks at whether a client that gets nothing yet has left


class FrontModel:
    """Triton's Python backend calls these methods of the class that model.py makes of it.

    Attributes:
        bundle: Its folder.
    """

    bundle: Path

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Args:
            args: The backend's; `model_config` is config.pbtxt as JSON.
        """
        if args.get("model_instance_kind") == "GPU":  # every instance is a process of its own
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        parameters = json.loads(args["model_config"])["parameters"]
        settings = {name: value["string_value"] for name, value in parameters.items()}
        bundle = Bundle(self.bundle, read_manifest(self.bundle))
        backend = choose_backend(
            bundle,
            Runtime(settings["runtime"]),
            target=settings.get("target"),
            providers=settings["providers"].split(",") if "providers" in settings else (),
        )
        self._session = Session.open(bundle, runner=backend)
        slots, waiting, capacity = (int(settings[name]) for name in ("slots", "waiting", "capacity"))
        self._engine = Engine(self._session, slots=slots or None, waiting=waiting, capacity=capacity or None)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="ep-export-responses", daemon=True
        )
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their responses are sent from another thread, also after this returns."""
        triton = server()
        for request in requests:
            # What belongs to a request is read now: it is gone once this returns, its sender is not.
            sender = request.get_response_sender()
            try:
                inputs = RequestInputs(request)
                live, stream = inputs.flag("stream"), self._engine.submit(_asked(inputs))
            except Exception as error:  # noqa: BLE001 - whatever a codec raises on somebody's input
                sender.send(_refusal(error), flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            asyncio.run_coroutine_threadsafe(_follow(stream, sender, live=live), self._loop)

    def finalize(self) -> None:
        """Finish what was begun, then close what was opened."""
        self._engine.close()
        asyncio.run_coroutine_threadsafe(_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._session.close()


def _asked(inputs: RequestInputs) -> Request:
    """The request as the engine takes it.

    Raises:
        UserError: An input is not what it should be.
    """
    longest = inputs.number("max_new_tokens")
    return Request(
        question=inputs.text("prompt"),
        visuals=tuple(inputs.visuals()),
        keep=inputs.keep(),
        policies=tuple(inputs.texts("policy")),
        sampling=inputs.sampling(),
        max_new_tokens=_MAX_NEW_TOKENS if longest is None else int(longest),
    )


async def _follow(stream: Stream, sender: Any, *, live: bool) -> None:
    """Send one request's responses. Whatever happens, its last one is sent: the client waits for it."""
    final = server().TRITONSERVER_RESPONSE_COMPLETE_FINAL
    looking = asyncio.create_task(_cancel_when_gone(stream, sender))
    try:
        async with aclosing(_pieces(stream)) as pieces:
            async for piece in pieces:
                if live and not stream.cancelled:
                    sender.send(_response(text=piece))
                if sender.is_cancelled():
                    stream.cancel()
        answer = stream.answer
        if answer.finish is Finish.CANCELLED:
            sender.send(flags=final)
        else:
            sender.send(_response(text="" if live else answer.text, answer=answer), flags=final)
    except Exception as error:  # noqa: BLE001 - whatever a model raises on somebody's input
        sender.send(_refusal(error), flags=final)
    finally:
        looking.cancel()


async def _pieces(stream: Stream) -> AsyncGenerator[str]:
    async for piece in stream:
        yield piece


async def _cancel_when_gone(stream: Stream, sender: Any) -> None:
    """For as long as no text comes: the client may leave while its request waits."""
    while not stream.done:
        if sender.is_cancelled():
            stream.cancel()
            return
        await asyncio.sleep(_LOOK_SECONDS)


async def _others() -> None:
    """Wait for every other task of the loop."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


def _response(*, text: str, answer: Answer | None = None) -> Any:
    """One response. All outputs are there; before the last one only text is known."""
    triton = server()
    kept = answer.prompt.kept_index if answer and answer.prompt else ()
    outputs = {
        "text": np.array([text.encode()], dtype=np.object_),
        "token_ids": np.array(answer.token_ids if answer else (), dtype=np.int64),
        "kept_index": np.array(kept, dtype=np.int64),
        "finish_reason": np.array([answer.finish.value.encode() if answer else b""], dtype=np.object_),
    }
    return triton.InferenceResponse(
        output_tensors=[triton.Tensor(name, values) for name, values in outputs.items()]
    )


def _refusal(error: Exception) -> Any:
    """One sentence, and a code that says whose fault it is."""
    triton = server()
    if isinstance(error, UserError):
        told = f"{error} ({error.hint})" if error.hint else str(error)
        busy = isinstance(error, EngineFull | EngineClosed)
        code = triton.TritonError.UNAVAILABLE if busy else triton.TritonError.INVALID_ARG
    else:
        _LOG.error("a request failed", exc_info=error)
        told, code = f"{type(error).__name__}: {reason(error)}", triton.TritonError.INTERNAL
    return triton.InferenceResponse(output_tensors=[], error=triton.TritonError(told, code))

"""The process: binds, answers, and ends in order when it is told to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

from ep_export.errors import UserError
from ep_export.serve.app import create_app
from ep_export.serve.connections import listening_socket, protocol_for
from ep_export.serving import Request

if TYPE_CHECKING:
    from ep_export.bundle import Manifest
    from ep_export.serve.chat import ChatCompletions
    from ep_export.serve.limits import Limits
    from ep_export.serving import Engine

__all__ = ["bind", "run_server", "warm_up"]

_LAST_WORDS = 2  # seconds beyond `Limits.stop_seconds` for the last events to be sent
_FIRST_PICTURE = (224, 224)
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def bind(host: str, port: int) -> socket.socket:
    """Take an address before anything slow is done.

    Raises:
        UserError: It is taken, or not this machine's.
    """
    try:
        return listening_socket(host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}", hint="give another --port, or another --host"
        ) from error


def warm_up(engine: Engine, manifest: Manifest) -> None:
    """Ask once with every policy, so that nobody's first answer waits for components to be opened."""
    from PIL import Image

    picture = Image.new("RGB", _FIRST_PICTURE, "grey")
    for policy in manifest.policies:
        with suppress(UserError):  # too little capacity for it, say: then it is for no request's good
            stream = engine.submit(
                Request(question="hello", visuals=(picture,), policies=(policy,), max_new_tokens=1)
            )
            _ = stream.answer


def run_server(
    engine: Engine,
    manifest: Manifest,
    listening: socket.socket,
    *,
    name: str,
    limits: Limits,
    key: str | None = None,
    hosts: Sequence[str] = (),
    on_start: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let answers finish, for seconds, and end the others.

    Args:
        engine: Answers; left open.
        manifest: The bundle's.
        listening: From `bind`; closed at the end.
        name: Of the model.
        limits: Of requests.
        key: What clients must show.
        hosts: Names this server may be called by, beside its own; any, where it listens to other machines.
        on_start: Called with the address when connections are taken.
    """
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    local = address in {"127.0.0.1", "::1"}
    # A page of another site may have its own name point here; it cannot change the name it calls.
    known = (*_LOOPBACK, *hosts) if local else hosts or ("*",)
    app, chat = create_app(engine, manifest, name=name, limits=limits, key=key, hosts=known)
    config = uvicorn.Config(
        app,
        http=protocol_for(limits),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=round(limits.stop_seconds) + _LAST_WORDS,
    )
    _Server(config, chat, limits, lambda: on_start(f"http://{shown}:{port}")).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, chat: ChatCompletions, limits: Limits, on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._chat, self._limits, self._on_start = chat, limits, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        ending = loop.call_later(self._limits.stop_seconds, self._chat.stop)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

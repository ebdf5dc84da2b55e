"""Connections that ask nothing do not stay: slow headers, half a body, silence, and clients that vanished.

Uvicorn closes a connection that is idle after a response; before one, and while headers or a body trickle in,
it waits for ever. Here a connection has some seconds to send its request. Of those that have not, only so
many are kept: a newer one takes the place of the oldest, so that many slow ones keep out none that speaks.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from ep_export.serve.limits import Limits

__all__ = ["listening_socket", "protocol_for"]

_BACKLOG = 512
_UNREAD_MS = 30_000  # for what was sent to be acknowledged, also by a client whose window is shut
_SILENT_S = 60  # before the system asks whether a client is still there


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket whose connections the system itself ends when nobody reads or the client has vanished.

    Raises:
        OSError: The address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    # inherited by accepted connections
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_USER_TIMEOUT", _UNREAD_MS),
        ("TCP_KEEPIDLE", _SILENT_S),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
    ):
        if hasattr(socket, name):  # Linux has them all
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return listening


def protocol_for(limits: Limits) -> type[H11Protocol]:
    """The HTTP protocol of uvicorn with a bound on waiting for requests.

    Args:
        limits: Seconds, and how many connections may wait.
    """
    waiting: dict[BoundedProtocol, asyncio.TimerHandle] = {}
    # a body that is too slow is refused by the application, in time to be told
    seconds = {h11.IDLE: limits.header_seconds, h11.SEND_BODY: limits.body_seconds + limits.header_seconds}

    class BoundedProtocol(H11Protocol):
        """One connection; the oldest that is waited for stands first in `waiting`."""

        awaited: Any = None
        """h11's state of a client that has not sent all of its request, while it is waited for."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._look()  # before uvicorn takes new data for a sign of life
            super().data_received(data)

        def handle_events(self) -> None:
            super().handle_events()
            self._look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._look()

        def _look(self) -> None:
            """Whether anything is waited for: headers, or a body, also one whose request was refused."""
            theirs = self.conn.their_state
            if theirs not in seconds:
                self.stop_waiting()
            elif theirs is not self.awaited and not self.transport.is_closing():
                self._wait(theirs)

        def _wait(self, state: Any) -> None:
            if self in waiting:
                waiting[self].cancel()  # it keeps its place
            elif len(waiting) >= limits.waiting_connections:
                oldest = next(iter(waiting))
                oldest.stop_waiting()  # at once: the system tells it of its end only later
                oldest.transport.abort()
            self.awaited = state
            waiting[self] = self.loop.call_later(seconds[state], self.transport.abort)

        def stop_waiting(self) -> None:
            """Its request came whole, or it ends."""
            self.awaited = None
            timer = waiting.pop(self, None)
            if timer is not None:
                timer.cancel()

    return BoundedProtocol

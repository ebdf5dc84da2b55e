"""What a server takes from people it does not know, as data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request, and of what all of them hold together.

    Attributes:
        body_bytes: Of a request.
        body_seconds: For a request to arrive whole, from its headers on.
        header_seconds: For its headers to arrive, from the first byte or the connection on.
        pictures: In a request, all its messages together.
        pixels: Of all pictures of a request; they are decoded one request at a time.
        new_tokens: Longest answer; a request that asks for more gets as many.
        seconds: From a request to the end of its answer, waiting included.
        requests: At once, waiting ones included.
        held_bytes: Of the bodies and the decoded pictures of all of them.
        waiting_connections: Whose request has not come whole; beyond, the oldest is closed.
        fetch: Whether pictures may be fetched from http and https addresses.
        fetch_bytes: Of one fetched picture.
        fetch_seconds: For one picture, redirections included.
        stop_seconds: Given to answers under way when the server is told to end.
    """

    body_bytes: int = 32 * _MIB
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    pictures: int = 8
    pixels: int = 50_000_000
    new_tokens: int = 1024
    seconds: float = 300.0
    requests: int = 80
    held_bytes: int = 1024 * _MIB
    waiting_connections: int = 256
    fetch: bool = False
    fetch_bytes: int = 16 * _MIB
    fetch_seconds: float = 10.0
    stop_seconds: float = 5.0

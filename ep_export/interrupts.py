"""Ctrl-C waits for the few lines that must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C during the block raises KeyboardInterrupt at its end instead of within it.

    Only the main thread is ever interrupted; elsewhere the block runs as it is. A handler that somebody else
    set, or SIGINT ignored, stays in force.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    arrived = False

    def remember(*_: object) -> None:
        nonlocal arrived
        arrived = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if arrived:
            raise KeyboardInterrupt

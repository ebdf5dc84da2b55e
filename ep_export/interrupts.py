"""Ctrl-C and SIGTERM end a run alike, as KeyboardInterrupt; a few lines must not be cut in two by either."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["Terminated", "terminable", "uninterrupted"]


class Terminated(KeyboardInterrupt):
    """SIGTERM. It ends a run as Ctrl-C does, so that the same clean-up happens."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM during the block raises `Terminated` in the main thread.

    A handler that somebody else set stays in force, as it does where this is not the main thread.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM during the block raise at its end instead of within it.

    Only the main thread is ever interrupted; elsewhere the block runs as it is. A handler that somebody else
    set, or a signal that is ignored, stays in force.
    """
    deferred = {
        number: handler for number, handler in _HANDLERS.items() if signal.getsignal(number) is handler
    }
    if not deferred or not _in_main_thread():
        yield
        return
    arrived: list[int] = []
    for number in deferred:
        signal.signal(number, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in deferred.items():
            signal.signal(number, handler)
        if arrived:
            deferred[arrived[0]](arrived[0], None)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


_HANDLERS: dict[int, Callable[[int, None], object]] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: _terminate,
}


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

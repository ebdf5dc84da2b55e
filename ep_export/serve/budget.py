"""Memory that all requests together may hold for bodies and pictures: what each may have, many must not."""

from __future__ import annotations

import threading

from ep_export.serve.api_error import ApiError

__all__ = ["Budget", "Share"]


class Budget:
    """Bytes, counted from any thread.

    Args:
        most: Bytes.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held, self._lock = most, 0, threading.Lock()

    def add(self, count: int) -> None:
        """Hold more, or with a negative count less.

        Raises:
            ApiError: There is no room.
        """
        with self._lock:
            if count > 0 and self._held + count > self._most:
                raise ApiError(
                    429, "the server's memory for requests is full", code="server_full", retry_after=1
                )
            self._held += count


class Share:
    """What one request holds; a context, at whose end it is given back."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._held = budget, 0

    def __enter__(self) -> Share:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *exception: object) -> None:
        self._budget.add(-self._held)

    def take(self, count: int) -> None:
        """Hold so many bytes more.

        Raises:
            ApiError: There is no room.
        """
        self._budget.add(count)
        self._held += count

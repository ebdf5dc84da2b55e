"""How long work reports itself. Only `ep_export.cli` draws it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total) when a stage starts (done = 0) and after each step of it."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""

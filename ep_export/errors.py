"""Errors a person can act on. Only `ep_export.cli` turns them into output and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UsageError", "UserError", "near_matches"]


class UserError(Exception):
    """Something the user can mend: one sentence that names the object, then a hint with the fix.

    Args:
        message: One sentence: the object, what was found, what was expected.
        hint: The fix, as an instruction. Empty when the message already says it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(UserError):
    """The command line itself asks for something impossible (exit code 2)."""

    exit_code = 2


def near_matches(name: str, known: Iterable[str]) -> str:
    """Hint for an unknown name: the closest known ones, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names)}"

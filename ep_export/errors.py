"""Errors a person can act on. Only `ep_export.cli` turns them into output and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["UsageError", "UserError", "as_user_error", "near_matches", "reason"]

_PANIC = "PanicException"  # what pyo3 makes of a panic in Rust; it has no importable name
_REASON_CHARACTERS = 300  # of a library's message: what went wrong, not its whole inventory


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


def reason(error: BaseException) -> str:
    """What an exception says, on one line; its type too where that is not enough."""
    said = " ".join(str(error).split())
    if not said or isinstance(error, LookupError):  # of a KeyError that is the key alone
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= _REASON_CHARACTERS else f"{said[:_REASON_CHARACTERS]}…"


@contextmanager
def as_user_error(sentence: str, *, hint: str) -> Iterator[None]:
    """Whatever a library raises on somebody's file, as one sentence; its block is one call of that library.

    Parsers raise what their input leads to: tokenizers a plain Exception, or a panic that is none; Pillow's
    decoders IndexError or RuntimeError; transformers' constructors nearly everything. No list of types would
    be complete.

    Args:
        sentence: What is at fault; the library's reason is put behind it.
        hint: The fix.

    Raises:
        UserError: In place of any exception but a `UserError`, and a lack of memory, which is no fault of the
            file.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise UserError(f"{sentence}: {reason(error)}", hint=hint) from error

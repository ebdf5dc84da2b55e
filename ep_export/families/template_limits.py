"""Chat templates within bounds: they are programs, and they come with the checkpoint.

jinja2's sandbox keeps a template from files, attributes and code. It does not keep it from looping for hours
or from filling the memory; that is done here. The watch is a trace function: it sees every line of the
template's code, in this thread alone, and needs neither a second process nor the main thread. A single
operation of Python's own is not interrupted, so powers, whose digits take for ever in one, are refused
beforehand; what is left are products of ever longer numbers, which overrun a few times over.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_export.errors import UserError

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["check_template", "rendering"]

_MOST_CHARACTERS = 1 << 17  # several times the longest published template
_MOST_SECONDS = 5.0  # a published one takes milliseconds, and some hundred where nothing is loaded yet
_MOST_BYTES = 1 << 30
_HINT = "use the model's published template"


class _OutOfTime(BaseException):
    """Passes jinja2's handlers, which take Exceptions for errors of the template."""


@lru_cache(maxsize=8)  # every prompt of a model has the same one
def check_template(template: str) -> None:
    """Refuse a template before it is compiled.

    Raises:
        UserError: It is too long, or computes powers.
    """
    import jinja2

    if len(template) > _MOST_CHARACTERS:
        raise UserError(
            f"the checkpoint's chat template has {len(template)} characters, expected at most "
            f"{_MOST_CHARACTERS}",
            hint=_HINT,
        )
    try:
        tokens = jinja2.Environment(autoescape=True).lex(template)
        powers = any((kind, text) == ("operator", "**") for _, kind, text in tokens)
    except jinja2.TemplateError:
        return  # its fault is said where it is rendered
    if powers:
        raise UserError("the checkpoint's chat template computes powers, which no prompt needs", hint=_HINT)


@contextmanager
def rendering() -> Iterator[None]:
    """Within the block, this thread's code runs for seconds at most and in bounded memory.

    Raises:
        UserError: It did not.
    """
    before = sys.gettrace()
    try:
        with _bounded_memory():
            sys.settrace(_watch(time.monotonic() + _MOST_SECONDS))
            try:
                yield
            finally:
                sys.settrace(before)
    except _OutOfTime as error:
        raise UserError(
            f"the checkpoint's chat template takes over {_MOST_SECONDS:g} seconds", hint=_HINT
        ) from error
    except MemoryError as error:
        raise UserError(
            f"the checkpoint's chat template needs over {_MOST_BYTES >> 30} GiB of memory", hint=_HINT
        ) from error


# Where Python swallows what is raised, and ends the watch with it.
_SWALLOWING = weakref.WeakKeyDictionary.__init__.__code__.co_filename


def _watch(deadline: float) -> Any:
    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        swallowed = code.co_name == "__del__" or code.co_filename == _SWALLOWING
        if time.monotonic() > deadline and not swallowed:
            raise _OutOfTime
        return trace

    return trace


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Where Linux counts it: the process may grow by `_MOST_BYTES`. It takes milliseconds, usually."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + _MOST_BYTES
    if soft != resource.RLIM_INFINITY and soft <= most:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

"""Printing: data on stdout, progress and notes on stderr. Meaning survives without colour.

File names, chat templates and what libraries say about them are other people's text. On stderr and in tables
it is shown with everything that moves a cursor, rings a bell or begins a line written out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ep_export.documents import encode
from ep_export.progress import Progress, silent

__all__ = [
    "note",
    "print_error",
    "print_json",
    "print_table",
    "printable",
    "progress_bar",
    "quiet_option",
    "verbose_option",
]

_MOST_CHARACTERS = 1000  # of a message: a dozen lines of a terminal


def printable(text: str) -> str:
    """Text on one line as a terminal shows it: line ends, control and formatting characters as escapes.

    Right-to-left marks and lone surrogates (names that are not UTF-8) count among them.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_error(message: str, hint: str) -> None:
    """The one line of an error, and the one of its hint, on stderr."""
    click.echo(f"error: {_cut(printable(message.strip()))}", err=True)
    if hint:
        click.echo(f"hint: {_cut(printable(hint.strip()))}", err=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(encode(value), indent=2, allow_nan=False))


def note(text: str) -> None:
    """A line for the person, on stderr; none with `--quiet`."""
    if not _quiet():
        click.echo(printable(text), err=True)


_QUIET = "ep_export.quiet"

quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, value: context.meta.__setitem__(_QUIET, value),
    help="No notes and no progress on stderr; errors remain.",
)

verbose_option = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, help="On an error also where it came from."
)


def _quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_QUIET, False)


def _cut(text: str) -> str:
    """A long message without its middle: the object stands in front, the reason behind."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    front, back = 2 * _MOST_CHARACTERS // 3, _MOST_CHARACTERS // 3
    return f"{text[:front]} … {text[-back:]}"


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, err: bool = False
) -> None:
    """A table on stdout (or stderr), as wide as it needs to be when nobody's terminal limits it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=err, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=err, highlight=False, width=200)
    table = Table(
        title=title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=any(header),
        pad_edge=False,
    )
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # shapes in brackets are no markup
    console.print(table)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar a stage on stderr; a line a stage where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    if _quiet():
        yield silent
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_a_stage
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _line_a_stage(stage: str, done: int, total: int) -> None:
    if done == 0:
        note(f"{stage} ({total})" if total > 1 else stage)

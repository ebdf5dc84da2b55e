"""What reaches a terminal is one line, short, and moves no cursor, whoever wrote the text."""

import errno

import click
import pytest
from command_line import ep_export

from ep_export.cli.console import note, print_error, print_table, printable
from ep_export.cli.main import cli
from ep_export.errors import UserError

HOSTILE = {
    "a\nerror: faked.png": r"a\nerror: faked.png",
    "a\r\x1b[2K\x1b[31mb": r"a\r\x1b[2K\x1b[31mb",
    "bell\x07": r"bell\x07",
    "\u202egnp.exe": r"\u202egnp.exe",
    "next\u2028line": r"next\u2028line",
    "not utf-8 \udcff": r"not utf-8 \udcff",
    "\x9b1A": r"\x9b1A",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items())
def test_what_moves_a_cursor_is_written_out(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", ["Zürich – 東京.png", "½ × 2", "", "two  spaces", "😀"])
def test_ordinary_text_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_errors_notes_and_tables_show_it_so(capsys, text):
    print_error(f"{text} is no picture", f"rename {text}")
    note(text)
    print_table("", ("name",), ((text,),), err=True)
    said = capsys.readouterr().err
    assert sum(line.startswith("error:") for line in said.splitlines()) == 1
    assert sum(line.startswith("hint:") for line in said.splitlines()) == 1
    assert all(line.isprintable() for line in said.split("\n"))


def test_a_long_message_is_cut_in_the_middle(capsys):
    print_error(f"photo.png is damaged: {'x' * 15_000} at byte 7", "")
    said = capsys.readouterr().err
    assert len(said) < 1100
    assert said.startswith("error: photo.png is damaged")
    assert said.endswith("at byte 7\n")


@pytest.fixture
def failing():
    """A verb that raises what a test gives it."""
    raised = []

    @cli.command("fail")
    def fail():
        raise raised[0]

    yield raised
    del cli.commands["fail"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "output: No space left on device"),
        (OSError(errno.EIO, "Input/output error", "a\nb"), r"a\nb: Input/output error"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "ulimit"),
        (OSError("no number, just\ntext"), "no number, just text"),
        (MemoryError(), "the memory is full"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not UTF-8"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), "encoding ascii"),
        (UserError("a\nb\x1b[31m", hint="c\nd"), r"a\nb\x1b[31m"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_bug_is_one_line_and_a_hint(failing, error, said):
    failing.append(error)
    result = ep_export("fail")
    assert result.code == 1
    lines = result.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    assert said in result.err
    assert result.out == ""


def test_a_bug_of_our_own_shows_where_it_is(failing):
    failing.append(KeyError("ours"))
    with pytest.raises(KeyError, match="ours"):
        ep_export("fail")


def test_a_usage_error_forges_no_line(failing):
    result = ep_export("fail", "a\nerror: faked.png")
    assert result.code == 2
    assert r"a\nerror: faked.png" in result.err
    assert not any(line.startswith("error: faked") for line in result.err.splitlines())


def test_another_error_of_click_is_one_line_too(failing):
    failing.append(click.ClickException("a\nb"))
    result = ep_export("fail")
    assert (result.code, result.err) == (1, "error: a\\nb\n")

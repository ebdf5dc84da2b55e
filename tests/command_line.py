"""The command line as a function, in this process: what it printed and its exit code."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

__all__ = ["Result", "ep_export"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def ep_export(*arguments: str) -> Result:
    """Run `ep-export ARGUMENTS` through its entry point."""
    from ep_export.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["ep-export", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            return Result(int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main() must exit")

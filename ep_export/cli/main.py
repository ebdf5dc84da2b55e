"""`ep-export`: the verbs, and the one place where errors become a line, a hint and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator

import click

import ep_export
from ep_export.cli.bench import bench
from ep_export.cli.build import build
from ep_export.cli.calibrate import calibrate
from ep_export.cli.compile import compile_verb
from ep_export.cli.console import print_error, print_json, printable, quiet_option, verbose_option
from ep_export.cli.export import export
from ep_export.cli.inspect import inspect
from ep_export.cli.missing import missing_package
from ep_export.cli.models import models
from ep_export.cli.package import package
from ep_export.cli.plan import plan
from ep_export.cli.plugin import plugin
from ep_export.cli.policy import policy
from ep_export.cli.run import run
from ep_export.cli.serve import serve
from ep_export.cli.sweep import sweep
from ep_export.cli.targets import targets
from ep_export.cli.validate import validate
from ep_export.errors import UserError, reason
from ep_export.interrupts import Terminated, terminable

__all__ = ["cli", "main"]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
EXIT_TERMINATED = 143  # 128 + SIGTERM

_EPILOG = """\b
Start here:
  ep-export plan  --model qwen2.5-vl-7b --keep 0.25
  ep-export build --model DIR --keep 0.25 --images PICTURES --out bundle
  ep-export run   bundle --image photo.jpg --prompt "What is this?"

Exit codes: 0 done, 1 failed, 2 usage, 3 validated and found different."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG
)
@click.version_option(ep_export.__version__, "-V", "--version", prog_name="ep-export")
@quiet_option
@verbose_option
def cli() -> None:
    """Export vision-language models with entropy pruning inside the decoder."""


for verb in (
    models,
    targets,
    plan,
    calibrate,
    build,
    export,
    policy,
    compile_verb,
    package,
    validate,
    run,
    serve,
    bench,
    sweep,
    inspect,
    plugin,
):
    cli.add_command(verb)


def main(program: str = "ep-export") -> None:
    """Entry point of the console script. Exits with 0, 1, 2, 3, 130 or 143.

    Args:
        program: What help and usage call it.
    """
    # Nobody asked for another library's notices: they would stand between a person and one line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with terminable():
        sys.exit(_run(program))


def _run(program: str) -> int:
    try:
        result = cli.main(prog_name=program, standalone_mode=False)
    except BaseException as error:  # noqa: BLE001 - a fault of ours is raised again
        return _ended_by(error)
    return result if isinstance(result, int) else 0


def _ended_by(error: BaseException) -> int:
    """What a verb raised as a line, a hint and an exit code.

    Raises:
        BaseException: The error itself, where it is a fault of ours.
    """
    # click makes its Abort of an interruption, and a module of native code that is being imported an
    # ImportError; `ep_export.measure.journal.Interrupted` has a hint.
    causes = list(_causes(error))
    if any(isinstance(cause, (KeyboardInterrupt, click.Abort)) for cause in causes):
        hints = [getattr(cause, "hint", "") for cause in causes if isinstance(cause, KeyboardInterrupt)]
        hint = next((hint for hint in hints if hint), "")
        terminated = any(isinstance(cause, Terminated) for cause in causes)
        code = EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
        return _fail("interrupted; no output was left half-written", hint, code)
    if isinstance(error, UserError):
        return _fail(str(error), error.hint, error.exit_code)
    if isinstance(error, click.UsageError):
        message = printable(error.format_message())
        click.UsageError(message, error.ctx).show()
        _fail_as_json(message, "", error.exit_code)
        return error.exit_code
    if isinstance(error, click.ClickException):
        return _fail(error.format_message(), "", error.exit_code)
    if isinstance(error, BrokenPipeError):
        # The reader of stdout left (`| head`); keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    if isinstance(error, (OSError, UnicodeError, MemoryError, RecursionError)):
        return _fail(*_not_ours(error), EXIT_FAILED)
    told = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
    if told is None:
        raise error
    return _fail(*told, EXIT_FAILED)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _not_ours(error: OSError | UnicodeError | MemoryError | RecursionError) -> tuple[str, str]:
    """What the machine or a file is at fault for and no code foresaw: a sentence and a hint."""
    if isinstance(error, OSError):
        where = "output" if error.filename is None else error.filename
        hint = _FILE_ERRORS.get(error.errno or 0, "check the path, its permissions and the free space")
        return f"{where}: {error.strerror or reason(error)}", hint
    if isinstance(error, UnicodeEncodeError):
        shown = error.object[error.start : error.start + 1]
        return (
            f"{shown!r} cannot be written in the encoding {error.encoding}",
            "set PYTHONIOENCODING=utf-8, or give names and questions this terminal can show",
        )
    if isinstance(error, UnicodeError):
        return f"a file holds text that is not UTF-8: {reason(error)}", "save it as UTF-8"
    if isinstance(error, MemoryError):
        return "the memory is full", "close other programs, or give a smaller model or smaller pictures"
    return "a file is nested too deeply to be read", "get it from its maker again"


_FILE_ERRORS = {
    errno.ENOSPC: "free some space, or give an --out on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: "check the permissions",
    errno.EROFS: "the file system is read-only; give another --out",
    # A file where a directory must be, or the other way round: paths a person gave, never the code's own.
    errno.EEXIST: "a file is in the way; give another path",
    errno.ENOENT: "a part of this path does not exist and cannot be made; give another one",
    errno.ENOTDIR: "a part of this path is a file; give another one",
    errno.EISDIR: "this is a directory; give a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "a link leads back to itself; give another path",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.EIO: "the disk or the network file system fails; give a path on another one",
}


def _fail(message: str, hint: str, code: int) -> int:
    print_error(message, hint)
    _fail_as_json(message, hint, code)
    if "-v" in sys.argv or "--verbose" in sys.argv:
        traceback.print_exc()
    return code


def _fail_as_json(message: str, hint: str, code: int) -> None:
    """Where a machine reads stdout it finds an object there, whatever happened."""
    if "--json" in sys.argv:
        print_json({"error": {"message": message, "hint": hint, "exit_code": code}})

"""`ep-export`: the verbs, and the one place where errors become a line, a hint and an exit code."""

from __future__ import annotations

import errno
import os
import sys

import click

import ep_export
from ep_export.cli.bench import bench
from ep_export.cli.build import build
from ep_export.cli.calibrate import calibrate
from ep_export.cli.compile import compile_verb
from ep_export.cli.export import export
from ep_export.cli.inspect import inspect
from ep_export.cli.models import models
from ep_export.cli.package import package
from ep_export.cli.plan import plan
from ep_export.cli.plugin import plugin
from ep_export.cli.run import run
from ep_export.cli.sweep import sweep
from ep_export.cli.targets import targets
from ep_export.cli.validate import validate
from ep_export.errors import UserError

__all__ = ["cli", "main"]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

_EPILOG = """\b
Start here:
  ep-export plan  --model qwen2.5-vl-7b --keep 0.25
  ep-export build --model DIR --keep 0.25 --images PICTURES --out bundle
  ep-export run   bundle --image photo.jpg --prompt "What is this?"

Exit codes: 0 done, 1 failed, 2 usage, 3 validated and found different."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG
)
@click.version_option(ep_export.__version__, prog_name="ep-export")
def cli() -> None:
    """Export vision-language models with entropy pruning inside the decoder."""


for verb in (
    models,
    targets,
    plan,
    calibrate,
    build,
    export,
    compile_verb,
    package,
    validate,
    run,
    bench,
    sweep,
    inspect,
    plugin,
):
    cli.add_command(verb)


def main(program: str = "ep-export") -> None:
    """Entry point of the console script. Exits with 0, 1, 2, 3 or 130.

    Args:
        program: What help and usage call it.
    """
    # Nobody asked for another library's notices: they would stand between a person and one line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(_run(program))


def _run(program: str) -> int:
    try:
        result = cli.main(prog_name=program, standalone_mode=False)
    except UserError as error:
        return _fail(str(error), error.hint, error.exit_code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; no output was left half-written", _after_interrupt(), EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout left (`| head`); keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        if error.errno in _FILE_ERRORS:
            return _fail(
                f"{error.filename or 'output'}: {error.strerror}", _FILE_ERRORS[error.errno], EXIT_FAILED
            )
        raise
    return result if isinstance(result, int) else 0


def _after_interrupt() -> str:
    resumable = {"calibrate", "sweep"}
    return "the same command goes on with what was measured" if resumable & set(sys.argv[1:2]) else ""


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
}


def _fail(message: str, hint: str, code: int) -> int:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    return code

"""What was measured so far, one line a question, so that an interrupted run goes on where it stopped.

The file's name is a hash of everything that decides the numbers except the questions: other settings start
another file. A line names its question by content. A last line cut short is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_export.documents import decode, encode
from ep_export.errors import UserError, reason
from ep_export.measure.provenance import processor_fingerprint, tool_versions
from ep_export.measure.question import QuestionResult
from ep_export.staging import exclusive

if TYPE_CHECKING:
    from types import TracebackType

    from ep_export.checkpoint import Checkpoint
    from ep_export.measure.bench import Setting

__all__ = ["Interrupted", "Journal", "Workplace", "discard", "journal_settings", "open_journal"]

_VERSION = 2
"""Raised when the meaning of a journal line changes."""

_NAME_DIGITS = 16
_SUFFIX = ".jsonl"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run that leaves measurements behind; `hint` says what becomes of them."""

    hint = "the same command goes on with what was measured"


class Journal:
    """Append-only results of one run.

    Args:
        directory: Where it lies; created.
        settings: Everything besides the questions that decides the numbers, JSON values.

    Raises:
        UserError: The directory cannot be made, or an earlier file not be read.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps(encode(settings), sort_keys=True)
        self.path = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS]}{_SUFFIX}"
        with _usable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._results = self._read()

    def __len__(self) -> int:
        """Results it holds."""
        return len(self._results)

    def find(self, key: str) -> QuestionResult | None:
        """The result of that question, if it was measured before."""
        return self._results.get(key)

    def add(self, result: QuestionResult) -> None:
        """Append a result; it is on disk when this returns.

        Raises:
            UserError: It cannot be written. The run must end: going on would lose what is measured.
        """
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(encode(result)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise UserError(
                f"measurements cannot be written to {self.path}: {error.strerror or reason(error)}",
                hint="free some space, or give an --out on another disk",
            ) from error
        self._results[result.key] = result

    def _read(self) -> dict[str, QuestionResult]:
        """Whole lines only: after the first that is not whole the rest is cut off, to append cleanly."""
        if not self.path.exists():
            return {}
        results: dict[str, QuestionResult] = {}
        good = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            result = _parse(line)
            if result is None:
                break
            results[result.key] = result
            good += len(line)
        with self.path.open("r+b") as stream:
            stream.truncate(good)
        return results


@contextmanager
def open_journal(directory: Path, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """A journal that no other run writes to meanwhile; see `Journal`.

    Raises:
        UserError: One does, or see there.
    """
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with exclusive(directory):
        yield Journal(directory, settings)


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{error.filename or directory} cannot be used: {error.strerror or reason(error)}"
        raise UserError(message, hint="give an output you may write to") from error


class Workplace:
    """The journal's directory: given, beside the output, or temporary; ours is removed after success.

    Args:
        out: The output; None when nothing is written.
        work: The directory, when it is given; it stays.
    """

    def __init__(self, out: Path | None, work: Path | None = None) -> None:
        self._out = out
        self._given = work
        self._directory = Path()

    def __enter__(self) -> Path:
        if self._given is not None:
            self._directory = self._given
        elif self._out is not None:
            self._directory = self._out.with_name(f".{self._out.name}.work")
        else:
            self._directory = Path(tempfile.mkdtemp(prefix="ep-export-measure-"))
        return self._directory

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        ours = self._given is None
        serves = kind is not None and not (ours and self._out is None) and _holds_results(self._directory)
        if ours and not serves:
            discard(self._directory)  # done, or nothing in it to go on from
        if serves and isinstance(error, KeyboardInterrupt):
            raise Interrupted from error


def discard(directory: Path) -> None:
    """Remove the journals of a directory, and it too unless somebody's other files lie in it."""
    with contextlib.suppress(OSError):
        for file in directory.glob(f"{'[0-9a-f]' * _NAME_DIGITS}{_SUFFIX}"):
            file.unlink()
        directory.rmdir()


def journal_settings(checkpoint: Checkpoint, setting: Setting) -> dict[str, object]:
    """Everything that decides the numbers of a journal, besides the questions."""
    return {
        "version": _VERSION,
        "tools": tool_versions(),
        "model": checkpoint.fingerprint,
        "processor": processor_fingerprint(checkpoint.processor_files),
        # wherever a shard lies, its name says what is in it
        "setting": replace(
            setting,
            rounded=Path(setting.rounded).name if setting.rounded else None,
            beside=tuple(replace(one, shard=Path(one.shard).name) for one in setting.beside),
        ),
    }


def _holds_results(directory: Path) -> bool:
    return any(file.stat().st_size for file in directory.glob(f"*{_SUFFIX}"))


def _parse(line: bytes) -> QuestionResult | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return decode(QuestionResult, json.loads(line))
    except (KeyError, TypeError, ValueError):
        return None

"""What was measured so far, one line a picture, so that an interrupted run goes on where it stopped.

The file's name is a hash of everything that decides the numbers except the pictures: other settings start
another file. A line names its picture by content and questions. A last line cut short is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ep_export.documents import decode, encode
from ep_export.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Journal", "PictureResult", "ResultLog"]


class _Keyed(Protocol):
    @property
    def key(self) -> str: ...


_R = TypeVar("_R", bound=_Keyed)


@dataclass(frozen=True)
class PictureResult:
    """Everything kept of one picture: its size does not depend on the picture's.

    Attributes:
        key: Hash of the picture's bytes and its questions.
        visual_tokens: N.
        answer_tokens: Answer positions measured, over all its questions.
        query_entropy: [L] nats.
        key_entropy: [L] nats.
        kl: Way key -> mean KL over the answer positions.
        agreement: Way key -> share of answer positions with the same top token.
    """

    key: str
    visual_tokens: int
    answer_tokens: int
    query_entropy: tuple[float, ...]
    key_entropy: tuple[float, ...]
    kl: Mapping[str, float]
    agreement: Mapping[str, float]


class ResultLog(Generic[_R]):
    """Append-only results of one run, frozen dataclasses with a `key`.

    Args:
        directory: Where it lies; created.
        settings: Everything besides the pictures that decides the numbers, JSON values.
        kind: The dataclass.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], kind: type[_R]) -> None:
        text = json.dumps(encode(settings), sort_keys=True)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"{directory} cannot be made: {error.strerror}"
            raise UserError(message, hint="give an output you may write to") from error
        self.path = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self._kind = kind
        self._results = self._read()

    def find(self, key: str) -> _R | None:
        """The result of that key, if it was measured before."""
        return self._results.get(key)

    def add(self, result: _R) -> None:
        """Append a result; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(encode(result)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._results[result.key] = result

    def _read(self) -> dict[str, _R]:
        """Whole lines only: after the first that is not whole the rest is cut off, to append cleanly."""
        if not self.path.exists():
            return {}
        results: dict[str, _R] = {}
        good = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            result = self._parse(line)
            if result is None:
                break
            results[result.key] = result
            good += len(line)
        with self.path.open("r+b") as stream:
            stream.truncate(good)
        return results

    def _parse(self, line: bytes) -> _R | None:
        if not line.endswith(b"\n"):
            return None
        try:
            return decode(self._kind, json.loads(line))
        except (KeyError, TypeError, ValueError):
            return None


class Journal(ResultLog[PictureResult]):
    """Results of one calibration; see `ResultLog`."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(directory, settings, PictureResult)

"""What a sweep asks: pictures of a folder, questions about them and, where they are known, right answers.

Anything that cannot be used is left out by name; the rest is asked in the order of the pictures' names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ep_export.calibrate.pictures import PictureFile, find_pictures
from ep_export.calibrate.questions import GENERIC_QUESTIONS
from ep_export.errors import UserError
from ep_export.sweep.record import Skipped

__all__ = ["Asking", "Item", "find_items", "normalise", "read_asking"]

Asking = Sequence[str] | Mapping[str, Sequence[Any]]
"""Questions asked in turn, one a picture; or file name -> entries, each a question or {question, answer}."""

_HINT = 'expected {"picture.png": {"question": "...", "answer": "..."}, ...}, or questions without answers'


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        picture: The file.
        digest: SHA-256 of the picture's bytes.
        question: As asked.
        answers: Right answers, any of which counts; empty where none is known.
        key: Hash of all of them.
    """

    picture: PictureFile
    digest: str
    question: str
    answers: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return hashlib.sha256("\0".join([self.digest, self.question, *self.answers]).encode()).hexdigest()


def normalise(text: str) -> str:
    """An answer as it is compared: no outer space or final stop, one space between words, case ignored."""
    return " ".join(text.split()).rstrip(".!").rstrip().casefold()


def read_asking(path: Path) -> Asking:
    """Questions, with or without answers, from JSON.

    Either a list of questions, asked in turn; or an object file name -> one entry or a list of them. An entry
    is a question or `{"question": ..., "answer": ...}`; the answer may be a list of which any counts.

    Raises:
        UserError: Missing, not JSON, empty, or neither a list nor an object.
    """
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"prompts file {path} does not exist", hint="check the path") from error
    except (OSError, ValueError) as error:
        raise UserError(f"prompts file {path} is not readable JSON: {error}", hint=_HINT) from error
    if isinstance(raw, dict) and raw:
        return {name: entries if isinstance(entries, list) else [entries] for name, entries in raw.items()}
    if (
        isinstance(raw, list)
        and raw
        and all(isinstance(question, str) and question.strip() for question in raw)
    ):
        return tuple(raw)
    raise UserError(f"prompts file {path} holds no questions", hint=_HINT)


def find_items(
    images: Path, asking: Asking | None, *, most: int | None = None, seed: int = 0
) -> tuple[tuple[Item, ...], tuple[Skipped, ...]]:
    """Everything that can be asked, in a stable order, and what cannot.

    Where any question has an answer, questions without one are left out: they would count in one table and
    not in the other.

    Args:
        images: Searched with its subfolders.
        asking: See `read_asking`; general questions when None.
        most: Ask a random sample of so many.
        seed: Of the sample.

    Raises:
        UserError: No such folder, no picture in it, or nothing that can be asked.
    """
    pictures = find_pictures(images)
    skipped = [*_without_picture(pictures, asking)]
    items: list[Item] = []
    for turn, picture in enumerate(pictures):
        try:
            digest = picture.sha256()
        except OSError as error:
            skipped.append(Skipped(picture.name, str(error)))
            continue
        for entry in _entries(asking, picture, turn):
            found = _item(picture, digest, entry)
            if isinstance(found, Item):
                items.append(found)
            else:
                skipped.append(found)
    if any(item.answers for item in items):
        reason = "no answer is given, though other questions have one"
        skipped += [
            Skipped(f"{item.picture.name}: {item.question}", reason) for item in items if not item.answers
        ]
        items = [item for item in items if item.answers]
    if not items:
        first = f"; the first: {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"nothing can be asked about the pictures in {images}{first}", hint=_HINT)
    if most is not None and len(items) > most:
        chosen = np.random.default_rng(seed).choice(len(items), size=most, replace=False)
        items = [items[i] for i in sorted(chosen)]
    return tuple(items), tuple(skipped)


def _without_picture(pictures: Sequence[PictureFile], asking: Asking | None) -> Iterator[Skipped]:
    if not isinstance(asking, Mapping):
        return
    known = {name for picture in pictures for name in (picture.name, picture.path.name)}
    for name in asking:
        if name not in known:
            yield Skipped(name, "the folder holds no such picture")


def _entries(asking: Asking | None, picture: PictureFile, turn: int) -> Sequence[Any]:
    if isinstance(asking, Mapping):
        return asking.get(picture.name) or asking.get(picture.path.name) or [None]
    questions = asking or GENERIC_QUESTIONS
    return [questions[turn % len(questions)]]


def _item(picture: PictureFile, digest: str, entry: Any) -> Item | Skipped:
    if entry is None:
        return Skipped(picture.name, "the prompts file asks nothing of it")
    question = entry.get("question") if isinstance(entry, dict) else entry
    if not isinstance(question, str) or not question.strip():
        return Skipped(picture.name, f"its entry {json.dumps(entry)[:60]} holds no question")
    if not isinstance(entry, dict) or "answer" not in entry:
        return Item(picture, digest, question, ())
    given = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
    if not given or not all(isinstance(answer, str) and normalise(answer) for answer in given):
        return Skipped(
            f"{picture.name}: {question}", f"its answer {json.dumps(entry['answer'])[:60]} is no text"
        )
    return Item(picture, digest, question, tuple(given))

"""What a sweep asks: pictures of a folder, questions about them and, where they are known, right answers.

Anything that cannot be used is left out by name; the rest is asked in the order of the pictures' names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ep_export.errors import UserError
from ep_export.measure.pictures import PictureFile, find_pictures
from ep_export.measure.prompts import GENERIC_QUESTIONS, Prompts, entries_for, kind_of
from ep_export.measure.question import Question, Skipped, normalise

__all__ = ["find_questions"]


def find_questions(
    images: Path, prompts: Prompts | None, *, most: int | None = None, seed: int = 0
) -> tuple[tuple[Question, ...], tuple[Skipped, ...]]:
    """Everything that can be asked, in a stable order, and what cannot.

    Where any question has an answer, questions without one are left out: they would count in one table and
    not in the other.

    Args:
        images: Searched with its subfolders.
        prompts: See `read_prompts`; general questions when None.
        most: Ask a random sample of so many.
        seed: Of the sample.

    Raises:
        UserError: No such folder, no picture in it, or nothing that can be asked.
    """
    pictures = find_pictures(images)
    skipped = [*_without_picture(pictures, prompts)]
    questions: list[Question] = []
    for outcome in _every(pictures, prompts or GENERIC_QUESTIONS):
        if isinstance(outcome, Question):
            questions.append(outcome)
        else:
            skipped.append(outcome)
    if any(question.answers for question in questions):
        reason = "no answer is given, though other questions have one"
        skipped += [Skipped(question.name, reason) for question in questions if not question.answers]
        questions = [question for question in questions if question.answers]
    if not questions:
        first = f"; the first: {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise UserError(
            f"nothing can be asked about the pictures in {images}{first}",
            hint="give prompts that name these pictures, or questions without names",
        )
    if most is not None and len(questions) > most:
        chosen = np.random.default_rng(seed).choice(len(questions), size=most, replace=False)
        questions = [questions[i] for i in sorted(chosen)]
    return tuple(questions), tuple(skipped)


def _without_picture(pictures: Sequence[PictureFile], prompts: Prompts | None) -> Iterator[Skipped]:
    if not isinstance(prompts, Mapping):
        return
    known = {name for picture in pictures for name in (picture.name, picture.path.name)}
    for name in prompts:
        if name not in known:
            yield Skipped(name, "the folder holds no such picture")


def _every(pictures: Sequence[PictureFile], prompts: Prompts) -> Iterator[Question | Skipped]:
    for turn, picture in enumerate(pictures):
        try:
            digest = picture.sha256()
        except OSError as error:
            yield Skipped(picture.name, str(error))
            continue
        entries = entries_for(prompts, picture.name, turn)
        if not entries:
            yield Skipped(picture.name, "the prompts file asks nothing of it")
        for entry in entries:
            yield _question(picture, digest, entry)


def _question(picture: PictureFile, digest: str, entry: Any) -> Question | Skipped:
    text = entry.get("question") if isinstance(entry, dict) else entry
    if not isinstance(text, str) or not text.strip():
        return Skipped(picture.name, f"its entry {json.dumps(entry)[:60]} holds no question")
    question = Question(picture, digest, text, kind=kind_of(entry))
    if not isinstance(entry, dict) or "answer" not in entry:
        return question
    answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
    if not answers or not all(isinstance(answer, str) and normalise(answer) for answer in answers):
        return Skipped(question.name, f"its answer {json.dumps(entry['answer'])[:60]} is no text")
    return replace(question, answers=tuple(answers))

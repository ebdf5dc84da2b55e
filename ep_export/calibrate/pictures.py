"""What a calibration asks, picture by picture, and what comes back: results as matrices [pictures, ways]."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ep_export.errors import UserError
from ep_export.measure.prompts import Prompts, entries_for, kind_of, question_of
from ep_export.measure.question import Question, QuestionResult, Skipped
from ep_export.runtime.pictures import open_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from ep_export.measure.executors import Outcome
    from ep_export.measure.pictures import PictureFile
    from ep_export.measure.ways import Way

__all__ = ["Asked", "Usable", "ask_about", "figures", "first_shown", "usable_pictures"]


@dataclass(frozen=True)
class Asked:
    """What is asked of one picture.

    Attributes:
        questions: At least one.
        kinds: Of every question what the prompts call its kind; None where they do not.
    """

    questions: tuple[Question, ...]
    kinds: tuple[str | None, ...]


@dataclass(frozen=True)
class Usable:
    """Pictures whose questions could all be asked.

    Attributes:
        asked: One for every picture.
        results: Of its questions.
        skipped: The others, `name: reason`.
    """

    asked: tuple[Asked, ...]
    results: tuple[tuple[QuestionResult, ...], ...]
    skipped: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of question that the prompts name, sorted."""
        return tuple(sorted({kind for asked in self.asked for kind in asked.kinds if kind is not None}))

    def of_kind(self, kind: str) -> tuple[tuple[QuestionResult, ...], ...]:
        """Results of the questions of a kind, for every picture that has one."""
        chosen = (
            tuple(result for result, one in zip(results, asked.kinds, strict=True) if one == kind)
            for asked, results in zip(self.asked, self.results, strict=True)
        )
        return tuple(results for results in chosen if results)


def ask_about(pictures: Sequence[PictureFile], prompts: Prompts) -> tuple[tuple[Asked, ...], list[Skipped]]:
    """What is asked of pictures that can be read, and those that cannot.

    One seen twice is left out: it would narrow every interval without adding evidence.
    """
    asked: list[Asked] = []
    skipped: list[Skipped] = []
    names: dict[str, str] = {}  # SHA-256 -> picture
    for turn, picture in enumerate(pictures):
        try:
            digest = picture.sha256()
        except OSError as error:
            skipped.append(Skipped(picture.name, str(error)))
            continue
        entries = entries_for(prompts, picture.name, turn)
        texts = [question_of(entry) for entry in entries]
        if not entries or None in texts:
            skipped.append(Skipped(picture.name, "the prompts file asks nothing of it"))
        elif digest in names:
            skipped.append(Skipped(picture.name, f"the same picture as {names[digest]}"))
        else:
            names[digest] = picture.name
            questions = tuple(Question(picture, digest, text or "") for text in texts)
            asked.append(Asked(questions, tuple(kind_of(entry) for entry in entries)))
    return tuple(asked), skipped


def first_shown(asked: Sequence[Asked], most: int) -> tuple[list[Image.Image], list[str]]:
    """So many pictures that can be opened and a question about each, to round weights by."""
    pictures: list[Image.Image] = []
    questions: list[str] = []
    for one in asked:
        if len(pictures) == most:
            break
        with contextlib.suppress(UserError):  # named where it is measured
            pictures.append(open_picture(one.questions[0].picture.path))
            questions.append(one.questions[0].text)
    return pictures, questions


def usable_pictures(
    asked: Sequence[Asked], outcomes: Mapping[str, Outcome], skipped: Sequence[Skipped]
) -> Usable:
    """Results picture by picture; one with a question that cannot be used is left out whole.

    Args:
        asked: Of every picture.
        outcomes: By `Question.key`.
        skipped: Pictures that were not asked about.

    Raises:
        UserError: No picture can be used.
    """
    unusable = {one.name: one.reason for one in skipped}
    good: list[tuple[Asked, tuple[QuestionResult, ...]]] = []
    for one in asked:
        results = [outcomes[question.key] for question in one.questions]
        refused = [result.reason for result in results if isinstance(result, Skipped)]
        if refused:
            unusable.setdefault(one.questions[0].picture.name, refused[0])
        else:
            good.append((one, tuple(r for r in results if isinstance(r, QuestionResult))))
    named = tuple(f"{name}: {reason}" for name, reason in sorted(unusable.items()))
    if not good:
        message = f"none of the {len(named)} pictures can be used; the first: {named[0]}"
        raise UserError(message, hint="give a folder with readable pictures, and questions that match them")
    return Usable(tuple(one for one, _ in good), tuple(results for _, results in good), named)


def figures(
    pictures: Sequence[Sequence[QuestionResult]], ways: Sequence[Way]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL and agreement, each [pictures, ways]; every answer position of a picture weighs the same."""
    kl = [[_mean(results, way.key, "kl") for way in ways] for results in pictures]
    agreement = [[_mean(results, way.key, "agreement") for way in ways] for results in pictures]
    shape = (len(pictures), len(ways))
    return np.array(kl).reshape(shape), np.array(agreement).reshape(shape)


def _mean(results: Sequence[QuestionResult], key: str, figure: str) -> float:
    """Over the answer positions of one picture's questions, and over draws."""
    means = [float(np.mean(getattr(result.ways[key], figure))) for result in results]
    return float(np.average(means, weights=[result.answer_tokens for result in results]))

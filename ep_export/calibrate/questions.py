"""What the model is asked about the pictures.

Fidelity is measured over the unpruned model's own answers, so no labels are needed; but the questions should
be those the model will meet, because which tokens matter depends on what is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ep_export.errors import UserError

__all__ = ["GENERIC_QUESTIONS", "Questions", "questions_for", "read_questions"]

GENERIC_QUESTIONS = (
    "Describe this picture.",
    "What is in this picture, and where?",
    "How many objects are in this picture?",
)

Questions = Sequence[str] | Mapping[str, Sequence[str]]
"""Either questions asked in turn, one a picture, or file name -> all questions asked of that picture."""


def read_questions(path: Path) -> Questions:
    """Questions from a JSON file: a list of strings, or an object file name -> entry or list of entries.

    An entry is a question, or `{"question": ..., "answer": ...}` as a sweep reads it; the answer is not used.

    Raises:
        UserError: Missing, not JSON, empty, or of another structure.
    """
    hint = 'expected ["question", ...] or {"picture.png": "question", ...}'
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"prompts file {path} does not exist", hint="check the path") from error
    except (OSError, ValueError) as error:
        raise UserError(f"prompts file {path} is not readable JSON: {error}", hint=hint) from error
    if isinstance(raw, dict):
        raw = {name: _asked(entries) for name, entries in raw.items()}
    lists = list(raw.values()) if isinstance(raw, dict) else [raw]
    if not lists or not all(_is_questions(asked) for asked in lists):
        raise UserError(f"prompts file {path} holds no questions", hint=hint)
    questions: Questions = raw
    return questions


def questions_for(questions: Questions, name: str, turn: int) -> tuple[str, ...]:
    """What to ask of one picture.

    Args:
        questions: See `Questions`.
        name: The picture's path relative to its folder.
        turn: Its number, for questions asked in turn.

    Raises:
        UserError: A mapping that says nothing about this picture.
    """
    if not isinstance(questions, Mapping):
        return (questions[turn % len(questions)],)
    asked = questions.get(name) or questions.get(Path(name).name)
    if not asked:
        raise UserError(f"the prompts file asks nothing of {name}")
    return tuple(asked)


def _asked(entries: Any) -> list[Any]:
    listed = entries if isinstance(entries, list) else [entries]
    return [entry.get("question") if isinstance(entry, dict) else entry for entry in listed]


def _is_questions(asked: Any) -> bool:
    return isinstance(asked, list) and bool(asked) and all(isinstance(q, str) and q.strip() for q in asked)

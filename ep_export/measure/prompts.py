"""What the model is asked about pictures: one file format for all that ask.

A list of questions, asked in turn, one a picture; or an object file name -> one entry or a list of them. An
entry is a question, or `{"question": ..., "answer": ..., "kind": ...}`: the answer a text or a list of which
any counts, the kind the user's own name for questions of one sort. Both may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ep_export.documents import read_json
from ep_export.errors import UserError

__all__ = [
    "GENERIC_QUESTIONS",
    "Prompts",
    "Questions",
    "entries_for",
    "kind_of",
    "question_of",
    "questions_for",
    "read_asked",
    "read_prompts",
    "read_questions",
]

GENERIC_QUESTIONS = (
    "Describe this picture.",
    "What is in this picture, and where?",
    "How many objects are in this picture?",
)

Prompts: TypeAlias = Sequence[str] | Mapping[str, Sequence[Any]]
"""As read: questions asked in turn; or file name -> entries, none of them looked at yet."""

Questions: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]]
"""The same without answers."""

_HINT = 'expected {"picture.png": {"question": "...", "answer": "..."}, ...}, or questions without answers'


def read_prompts(path: Path) -> Prompts:
    """Prompts from a JSON file.

    Raises:
        UserError: Missing, not JSON, empty, or neither a list of questions nor an object.
    """
    if not path.exists():
        raise UserError(f"prompts file {path} does not exist", hint="check the path")
    raw = read_json(path, what="prompts file", hint=_HINT)
    if isinstance(raw, dict) and raw:
        return {name: entries if isinstance(entries, list) else [entries] for name, entries in raw.items()}
    if isinstance(raw, list) and raw and all(map(_is_question, raw)):
        return tuple(raw)
    raise UserError(f"prompts file {path} holds no questions", hint=_HINT)


def read_asked(path: Path) -> Prompts:
    """Prompts from a JSON file of which every entry is a question.

    Raises:
        UserError: See `read_prompts`; or an entry that is no question.
    """
    prompts = read_prompts(path)
    if isinstance(prompts, Mapping):
        for name, entries in prompts.items():
            if not entries or any(question_of(entry) is None for entry in entries):
                raise UserError(f"prompts file {path} holds no questions about {name}", hint=_HINT)
    return prompts


def read_questions(path: Path) -> Questions:
    """As `read_asked`, the questions' texts alone."""
    prompts = read_asked(path)
    if not isinstance(prompts, Mapping):
        return prompts
    return {name: [question_of(entry) or "" for entry in entries] for name, entries in prompts.items()}


def question_of(entry: Any) -> str | None:
    """The text of an entry; None where it is no question."""
    text = entry.get("question") if isinstance(entry, dict) else entry
    return text if _is_question(text) else None


def kind_of(entry: Any) -> str | None:
    """What sort of question an entry is, where it says so."""
    kind = entry.get("kind") if isinstance(entry, dict) else None
    return kind.strip() or None if isinstance(kind, str) else None


def entries_for(prompts: Prompts, name: str, turn: int) -> Sequence[Any]:
    """What there is to ask of one picture; empty where the prompts say nothing about it.

    Args:
        prompts: See `Prompts`.
        name: The picture's path relative to its folder; the file name alone counts too.
        turn: Its number, for questions asked in turn.
    """
    if isinstance(prompts, Mapping):
        return prompts.get(name) or prompts.get(Path(name).name) or ()
    return (prompts[turn % len(prompts)],)


def questions_for(questions: Questions, name: str, turn: int) -> tuple[str, ...]:
    """As `entries_for`, of questions.

    Raises:
        UserError: The prompts say nothing about this picture.
    """
    texts = entries_for(questions, name, turn)
    if not texts:
        raise UserError(f"the prompts file asks nothing of {name}")
    return tuple(texts)


def _is_question(entry: Any) -> bool:
    return isinstance(entry, str) and bool(entry.strip())

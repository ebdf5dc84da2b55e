"""What the model is asked about pictures: one file format for all that ask.

A list of questions, asked in turn, one a picture; or an object file name -> one entry or a list of them. An
entry is a question, or `{"question": ..., "answer": ...}`, the answer a text or a list of which any counts.
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
    "questions_for",
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


def read_questions(path: Path) -> Questions:
    """Questions from a JSON file, answers left out.

    Raises:
        UserError: See `read_prompts`; or an entry that is no question.
    """
    prompts = read_prompts(path)
    if not isinstance(prompts, Mapping):
        return prompts
    questions: dict[str, list[str]] = {}
    for name, entries in prompts.items():
        texts: list[Any] = [e.get("question") if isinstance(e, dict) else e for e in entries]
        if not texts or not all(map(_is_question, texts)):
            raise UserError(f"prompts file {path} holds no questions about {name}", hint=_HINT)
        questions[name] = texts
    return questions


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

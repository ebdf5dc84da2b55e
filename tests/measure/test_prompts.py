"""Prompt files: every form, read with distrust."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ep_export.errors import UserError
from ep_export.measure.prompts import (
    entries_for,
    kind_of,
    question_of,
    questions_for,
    read_asked,
    read_prompts,
    read_questions,
)
from ep_export.measure.question import normalise


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.json"


def test_a_list_is_asked_in_turn(file: Path) -> None:
    file.write_text(json.dumps(["a?", "b?"]))
    listed = read_questions(file)
    assert [questions_for(listed, "x.png", turn) for turn in range(3)] == [("a?",), ("b?",), ("a?",)]
    assert entries_for(read_prompts(file), "x.png", 1) == ("b?",)


def test_an_object_is_asked_by_file(file: Path) -> None:
    file.write_text(json.dumps({"sub/x.png": "one?", "y.png": ["two?", "three?"]}))
    mapped = read_questions(file)
    assert questions_for(mapped, "sub/x.png", 7) == ("one?",)
    assert questions_for(mapped, "deep/y.png", 0) == ("two?", "three?")
    with pytest.raises(UserError, match=r"asks nothing of z\.png"):
        questions_for(mapped, "z.png", 0)


def test_answers_are_there_for_those_who_want_them(file: Path) -> None:
    prompts = {"a.png": {"question": "What?", "answer": "a cat"}, "b.png": ["Where?", {"question": "Who?"}]}
    file.write_text(json.dumps(prompts))
    assert entries_for(read_prompts(file), "a.png", 0) == [{"question": "What?", "answer": "a cat"}]
    assert read_questions(file) == {"a.png": ["What?"], "b.png": ["Where?", "Who?"]}


def test_kinds_are_there_for_those_who_want_them(file: Path) -> None:
    prompts = {
        "a.png": [{"question": "What?", "kind": " reading "}, "Where?", {"question": "Who?", "kind": 3}]
    }
    file.write_text(json.dumps(prompts))
    entries = entries_for(read_asked(file), "a.png", 0)
    assert [question_of(entry) for entry in entries] == ["What?", "Where?", "Who?"]
    assert [kind_of(entry) for entry in entries] == ["reading", None, None]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"one"', "[1]", '[" "]', "3", "NaN", "[" * 9999])
def test_other_structures_are_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError, match=r"prompts\.json") as raised:
        read_prompts(file)
    assert "picture.png" in raised.value.hint


@pytest.mark.parametrize("text", ['{"a.png": []}', '{"a.png": [3]}', '{"a.png": {"answer": "yes"}}'])
def test_entries_that_are_no_questions_are_refused_where_only_questions_count(file: Path, text: str) -> None:
    file.write_text(text)
    for read in (read_questions, read_asked):
        with pytest.raises(UserError, match=r"no questions about a\.png"):
            read(file)


def test_a_missing_file_is_named(file: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.json does not exist"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("one", "other"), [("Yes.", "yes"), ("  two  three ", "two three"), ("7", " 7!"), ("The Red", "the red")]
)
def test_answers_are_compared_as_people_would(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_different_answers_stay_different() -> None:
    assert len({normalise(text) for text in ("3", "13", "1 3", "no", "3.5", "")}) == 6

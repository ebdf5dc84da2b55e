"""What is asked: read with distrust, what cannot be used named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ep_export.errors import UserError
from ep_export.measure.prompts import read_prompts
from ep_export.sweep.questions import find_questions


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(("a", "b", "c")):
        Image.fromarray(np.full((8, 8, 3), 60 * number, dtype=np.uint8)).save(images / f"{name}.png")
    return images


def prompts(tmp_path, content):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(content))
    return read_prompts(file)


def test_every_form_of_an_entry(tmp_path, folder) -> None:
    given = {
        "a.png": {"question": "How many?", "answer": "2", "kind": "count"},
        "b.png": [{"question": "Which?", "answer": ["one", "1"]}, {"question": "Where?", "answer": "left"}],
    }
    questions, skipped = find_questions(folder, prompts(tmp_path, given))
    assert [(i.picture.name, i.text, i.answers) for i in questions] == [
        ("a.png", "How many?", ("2",)),
        ("b.png", "Which?", ("one", "1")),
        ("b.png", "Where?", ("left",)),
    ]
    assert [i.kind for i in questions] == ["count", None, None]
    assert [(s.name, s.reason) for s in skipped] == [("c.png", "the prompts file asks nothing of it")]
    assert len({question.key for question in questions}) == 3


def test_questions_without_answers_are_asked_in_turn(tmp_path, folder) -> None:
    questions, skipped = find_questions(folder, prompts(tmp_path, ["What?", "Where?"]))
    assert [question.text for question in questions] == ["What?", "Where?", "What?"]
    assert not skipped
    assert all(not question.answers for question in questions)
    assert len(find_questions(folder, None)[0]) == 3


def test_what_cannot_be_used_is_named_with_its_reason(tmp_path, folder) -> None:
    given = {
        "a.png": {"question": "How many?", "answer": "2"},
        "b.png": "Where?",
        "c.png": [
            {"question": " "},
            {"question": "Who?", "answer": ""},
            {"question": "Who?", "answer": 3},
            7,
        ],
        "d.png": {"question": "What?", "answer": "nothing"},
    }
    questions, skipped = find_questions(folder, prompts(tmp_path, given))
    assert [question.picture.name for question in questions] == ["a.png"]
    reasons = {skip.name: [] for skip in skipped}
    for skip in skipped:
        reasons[skip.name].append(skip.reason)
    assert reasons["d.png"] == ["the folder holds no such picture"]
    assert reasons["b.png: Where?"] == ["no answer is given, though other questions have one"]
    assert len(reasons["c.png"]) == 2
    assert all("holds no question" in reason for reason in reasons["c.png"])
    assert reasons["c.png: Who?"] == ['its answer "" is no text', "its answer 3 is no text"]


def test_a_folder_without_anything_to_ask_is_refused(tmp_path, folder) -> None:
    with pytest.raises(UserError, match="nothing can be asked about"):
        find_questions(folder, prompts(tmp_path, {"z.png": "What?"}))
    with pytest.raises(UserError, match="does not exist"):
        find_questions(tmp_path / "none", None)


def test_a_sample_is_the_same_each_time_and_in_order(folder) -> None:
    first, _ = find_questions(folder, None, most=2, seed=1)
    again, _ = find_questions(folder, None, most=2, seed=1)
    assert first == again
    assert len(first) == 2
    assert [question.picture.name for question in first] == sorted(
        question.picture.name for question in first
    )

"""What is asked: read with distrust, what cannot be used named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ep_export.errors import UserError
from ep_export.sweep.dataset import find_items, normalise, read_asking


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(("a", "b", "c")):
        Image.fromarray(np.full((8, 8, 3), 60 * number, dtype=np.uint8)).save(images / f"{name}.png")
    return images


def asking(tmp_path, content):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(content))
    return read_asking(file)


def test_every_form_of_an_entry(tmp_path, folder) -> None:
    given = {
        "a.png": {"question": "How many?", "answer": "2"},
        "b.png": [{"question": "Which?", "answer": ["one", "1"]}, {"question": "Where?", "answer": "left"}],
    }
    items, skipped = find_items(folder, asking(tmp_path, given))
    assert [(i.picture.name, i.question, i.answers) for i in items] == [
        ("a.png", "How many?", ("2",)),
        ("b.png", "Which?", ("one", "1")),
        ("b.png", "Where?", ("left",)),
    ]
    assert [(s.name, s.reason) for s in skipped] == [("c.png", "the prompts file asks nothing of it")]
    assert len({item.key for item in items}) == 3


def test_questions_without_answers_are_asked_in_turn(tmp_path, folder) -> None:
    items, skipped = find_items(folder, asking(tmp_path, ["What?", "Where?"]))
    assert [item.question for item in items] == ["What?", "Where?", "What?"]
    assert not skipped
    assert all(not item.answers for item in items)
    assert len(find_items(folder, None)[0]) == 3


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
    items, skipped = find_items(folder, asking(tmp_path, given))
    assert [item.picture.name for item in items] == ["a.png"]
    reasons = {skip.name: [] for skip in skipped}
    for skip in skipped:
        reasons[skip.name].append(skip.reason)
    assert reasons["d.png"] == ["the folder holds no such picture"]
    assert reasons["b.png: Where?"] == ["no answer is given, though other questions have one"]
    assert len(reasons["c.png"]) == 2
    assert all("holds no question" in reason for reason in reasons["c.png"])
    assert reasons["c.png: Who?"] == ['its answer "" is no text', "its answer 3 is no text"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '"a"', "[1]", '[" "]', "3"])
def test_other_structures_are_refused(tmp_path, content) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(UserError) as raised:
        read_asking(file)
    assert "picture.png" in raised.value.hint


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path, folder) -> None:
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        read_asking(tmp_path / "none.json")
    with pytest.raises(UserError, match="nothing can be asked"):
        find_items(folder, asking(tmp_path, {"z.png": "What?"}))
    with pytest.raises(UserError, match="does not exist"):
        find_items(tmp_path / "none", None)


def test_a_sample_is_the_same_each_time_and_in_order(folder) -> None:
    first, _ = find_items(folder, None, most=2, seed=1)
    again, _ = find_items(folder, None, most=2, seed=1)
    assert first == again
    assert len(first) == 2
    assert [item.picture.name for item in first] == sorted(item.picture.name for item in first)


@pytest.mark.parametrize(
    ("one", "other"), [("Yes.", "yes"), ("  two  three ", "two three"), ("7", " 7!"), ("The Red", "the red")]
)
def test_answers_are_compared_as_people_would(one, other) -> None:
    assert normalise(one) == normalise(other)


def test_different_answers_stay_different() -> None:
    assert len({normalise(text) for text in ("3", "13", "1 3", "no", "3.5", "")}) == 6

"""A dataclass survives its file; what was written by another hand is refused with the reason."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import pytest

from ep_export.documents import decode, encode, parse_json, read_document, read_json, write_document
from ep_export.errors import UserError


class Colour(str, Enum):
    RED = "red"


@dataclass(frozen=True)
class Part:
    shape: tuple[int | str, ...]
    pair: tuple[int, float] = (0, 0.0)


@dataclass(frozen=True)
class Note:
    colour: Colour
    parts: Mapping[str, Part]
    weight: float | None = None
    format: int = 1


NOTE = Note(Colour.RED, {"a": Part((1, "S"), (2, 0.5))})
RAW = {
    "colour": "red",
    "parts": {"a": {"shape": [1, "S"], "pair": [2, 0.5]}},
    "weight": None,
    "format": 1,
}


def read(file):
    def check(note):
        if not note.parts:
            raise ValueError("no parts")

    return read_document(file, Note, what="note", newest=1, hint="write it", check=check)


def test_dataclasses_enums_and_tuples_become_plain_values_and_come_back():
    assert encode(NOTE) == RAW
    assert decode(Note, RAW) == NOTE


def test_defaults_fill_in_extra_fields_are_ignored_and_an_integer_may_stand_for_a_float():
    raw = {"colour": "red", "parts": {}, "weight": 2, "later": True}
    assert decode(Note, raw) == Note(Colour.RED, {}, 2.0)
    assert type(decode(Note, raw).weight) is float


def test_a_written_file_reads_back_and_nothing_else_is_left(tmp_path):
    file = tmp_path / "note.json"
    write_document(file, NOTE)
    assert json.loads(file.read_text()) == RAW
    assert read(file) == NOTE
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "note.json"
    write_document(file, NOTE)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_document(file, Note(Colour.RED, {}, float("nan")))
    assert read(file) == NOTE
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_document(tmp_path / "taken", NOTE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.json", "taken"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, r"note .*note\.json has format 2, this ep-export reads up to 1"),
        ({"parts": {}}, r"note\.json is not a valid note: no parts"),
        ({"parts": []}, r"Note\.parts: expected an object, got list"),
        ({"parts": {"a": {}}}, r"Note\.parts\.a\.shape is missing"),
        ({"parts": {"a": {"shape": 1}}}, r"Note\.parts\.a\.shape: expected a list, got int"),
        ({"parts": {"a": {"shape": [1.5]}}}, r"Note\.parts\.a\.shape\[0\]: unexpected float"),
        ({"parts": {"a": {"shape": [], "pair": [1]}}}, r"pair: expected 2 values, got 1"),
        ({"colour": "blue"}, "blue"),
        ({"weight": True}, r"Note\.weight: unexpected bool"),
        ({"format": True}, r"Note\.format: expected int, got bool"),
    ],
)
def test_a_file_that_is_no_such_document_is_refused_with_the_reason(tmp_path, change, reason):
    file = tmp_path / "note.json"
    file.write_text(json.dumps({**RAW, **change}))
    with pytest.raises(UserError, match=reason) as refused:
        read(file)
    assert refused.value.hint == ("upgrade ep-export" if change.get("format") == 2 else "write it")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "is not readable JSON"), (b"\xff", "is not readable JSON"), (b"[]", "note: ")],
)
def test_a_file_that_holds_no_object_is_refused(tmp_path, content, reason):
    file = tmp_path / "note.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"note .*nowhere\.json does not exist"):
        read(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"NaN", "NaN is no number"),
        (b'{"weight": Infinity}', "Infinity is no number"),
        (b"-Infinity", "no number"),
        (b"1e999", "too large"),
        (b"1" * 5000, "4300"),
        (rb'"\ud800"', "surrogates not allowed"),
        (rb'{"\uDFFF": 1}', "surrogates not allowed"),
        (b"\xff", "can't decode"),
        (b"", "Expecting value"),
        (b'{"a": 1} x', "Extra data"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_json_that_cannot_be_computed_with_or_written_again_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "ü\n\x1b"], "😀": {}}, 10**400, "", [[]]])
def test_other_json_means_what_it_says(value):
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_a_key_may_stand_twice_unless_it_must_not():
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="'a' appears twice"):
        parse_json(b'{"b": {"a": 1, "a": 2}}', unique_keys=True)


def test_a_file_that_nobody_should_parse_is_refused(tmp_path):
    large = tmp_path / "large.json"
    with large.open("wb") as stream:
        stream.truncate(1 << 29)
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    os.mkfifo(tmp_path / "pipe.json")
    for name, reason in (
        ("large.json", "over 256 MiB"),
        ("loop.json", "is not a file"),
        ("pipe.json", "is not a file"),
        ("x" * 300, "name too long"),
        (".", "is not a file"),
    ):
        with pytest.raises(UserError, match=f"(?i){reason}") as refused:
            read_json(tmp_path / name, hint="get another")
        assert refused.value.hint == "get another"


def test_an_integer_too_large_for_a_float_field_is_refused(tmp_path):
    file = tmp_path / "note.json"
    file.write_text(json.dumps({**RAW, "weight": 10**400}))
    with pytest.raises(UserError, match=r"Note\.weight"):
        read(file)

"""`ep-export sweep` on the command line: mistakes are told in a line, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import ep_export

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"


@pytest.fixture
def verb(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"not a picture")
    out = ["--out", str(tmp_path / "out")]
    return ["sweep", "--model", str(READER), "--images", str(tmp_path / "images"), *out]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--keep", "2"], 2, "keep is 2, expected 0 < keep <= 1"),
        (["--keep", "nan"], 2, "keep is nan"),
        (["--keep", "0.5", "--layer", "12"], 2, "layer is 12, expected 0 to 11"),
        (["--keep", "0.25", "--layer", "5"], 2, "keep 0.25 is impossible at every layer"),
        (["--keep", "0.5", "--methods", "fastvv"], 2, "hint: did you mean fastv"),
        (["--keep", "0.5", "--methods", ","], 2, "--methods names no method"),
        (["--keep", "0.5", "--calibration-prompts", "x.json"], 2, "add --calibration-images"),
        (["--keep", "0.5", "--prompts", "none.json"], 1, "none.json does not exist"),
        (["--keep", "0.5", "--calibration", "none.json"], 1, "none.json does not exist"),
        (["--keep", "0.5", "--device", "abacus"], 1, "device abacus cannot be used"),
        ([], 2, "how much to keep is not given"),
        (["--cut", "2:0.5", "--cut", "1:0.2"], 2, "expected a later layer"),
        (["--cut", "two"], 2, "is not LAYER:SHARE"),
        (["--keep", "0.5", "--cut", "2:0.5:dart"], 2, "policy 'dart' is unknown"),
        (["--keep", "0.5", "--max-pixels", "0"], 2, "--max-pixels"),
    ],
)
def test_mistakes_get_one_line_and_the_right_code(verb, arguments, code, said) -> None:
    result = ep_export(*verb, *arguments)
    assert result.code == code, result.err
    assert said in result.err
    assert result.out == ""
    assert "Traceback" not in result.err


def test_a_folder_of_broken_pictures_says_so(verb) -> None:
    result = ep_export(*verb, "--keep", "0.5", "--methods", "random")
    assert result.code == 1
    assert "none of the 1 questions can be used" in result.err
    assert "is not a picture" in result.err


def test_methods_are_listed_with_their_sources() -> None:
    result = ep_export("sweep", "--list-methods")
    assert result.code == 0
    for text in ("scope", "arXiv 2510.24214", "horizon", "scaled-flops", "coverage-norm-lowest"):
        assert text in result.out
    for text in ("paper-highest", "FastV", "arXiv 2403.06764", "divprune", "arXiv 2503.02175", "random"):
        assert text in result.out


@pytest.mark.parametrize("order", [("--list-methods", "--json"), ("--json", "--list-methods")])
def test_methods_are_json_when_asked_in_either_order(order) -> None:
    names = [method["name"] for method in json.loads(ep_export("sweep", *order).out)["methods"]]
    assert {"paper-highest", "divprune", "random"} <= set(names)

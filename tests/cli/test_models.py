"""`ep-export models`: what it lists, that it says where each layer comes from, and that it can be read."""

import json

import pytest
from command_line import ep_export

from ep_export.aliases import ALIASES, find_alias
from ep_export.calibrate.choose import find_published
from ep_export.data import data_dir
from ep_export.families import FAMILIES

PUBLISHED = {"llava-1.5-7b": 2, "llava-next-vicuna-7b": 2, "llava-next-7b": 2, "qwen2.5-vl-7b": 1}


@pytest.fixture(scope="module")
def listed():
    result = ep_export("models", "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_every_alias_is_listed_with_what_scripts_read(listed):
    assert [model["alias"] for model in listed["models"]] == [alias.name for alias in ALIASES]
    for model in listed["models"]:
        assert {"alias", "family", "hub_id", "ecl", "provenance", "verified"} <= set(model)
        assert model["verified"]


def test_only_published_layers_are_known_and_they_name_their_source(listed):
    known = {model["alias"]: model for model in listed["models"] if model["ecl"] is not None}
    assert {alias: model["ecl"] for alias, model in known.items()} == PUBLISHED
    for model in known.values():
        assert model["provenance"] == "published"
        assert "arXiv 2602.17196" in model["source"]
    others = [model for model in listed["models"] if model["ecl"] is None]
    assert {model["provenance"] for model in others} == {"unknown"}


def test_shipped_records_are_published_and_belong_to_an_alias():
    files = sorted((data_dir("calibration") / "records").glob("*.json"))
    assert files
    for file in files:
        record = find_published(file.stem)
        assert record is not None, f"{file.name} belongs to no alias"
        assert record.provenance.kind.value == "published"
        assert record.images == 0  # nothing of it was measured
        assert "not measured here" in (record.recommendation or "")


def test_every_family_says_what_was_verified_and_what_was_not(listed):
    assert [family["family"] for family in listed["families"]] == [family.name for family in FAMILIES]
    for family in listed["families"]:
        assert family["model_types"]
        assert "Hugging Face" in family["verified"]
        assert "published weights" in family["verified"]
        assert family["verified"].endswith("not available here")


def test_a_second_name_resolves_to_its_checkpoint(listed):
    alias = find_alias("llava-next-7b")
    assert alias is not None
    assert alias.name == "llava-next-vicuna-7b"
    second = next(model for model in listed["models"] if model["alias"] == "llava-next-7b")
    assert (second["same_as"], second["hub_id"]) == (alias.name, alias.hub_id)
    assert find_alias(alias.hub_id) == alias


def test_people_get_lines_of_at_most_100_columns():
    result = ep_export("models")
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 100
    for alias in ALIASES:
        assert alias.name in result.out
    for family in FAMILIES:
        assert family.name in result.out
    assert "arXiv 2602.17196" in result.out
    assert "= llava-next-vicuna-7b" in result.out

"""Outputs are whole or absent."""

import pytest

from ep_export.errors import UserError
from ep_export.staging import staged


def test_what_was_built_appears_under_its_name(tmp_path):
    with staged(tmp_path / "out", overwrite=False, marker="mark") as aside:
        (aside / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_work_breaks_off(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "out", overwrite=False, marker="mark") as aside:
        (aside / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_work_starts(tmp_path):
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(UserError, match="exists already") as caught,
        staged(tmp_path / "out", overwrite=False, marker="mark"),
    ):
        pytest.fail("must not start")
    assert "--overwrite" in caught.value.hint


def test_overwrite_replaces_the_old_output_only_at_the_end(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").touch()
    with pytest.raises(ValueError, match="broken"), staged(tmp_path / "out", overwrite=True, marker="mark"):
        raise ValueError("broken")
    assert (tmp_path / "out" / "mark").exists()
    with staged(tmp_path / "out", overwrite=True, marker="mark") as aside:
        (aside / "new").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_a_directory_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").touch()
    with (
        pytest.raises(UserError, match="was not made by ep-export"),
        staged(tmp_path / "out", overwrite=True, marker="mark"),
    ):
        pytest.fail("must not start")
    assert (tmp_path / "out" / "diary.txt").exists()


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", overwrite=True, marker="mark") as aside:
        (aside / "mark").touch()
    assert (tmp_path / "out" / "mark").exists()

"""What was measured stays measured: another setting, damage, a full disk, Ctrl-C."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest
from tiny import make_tiny

from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.measure.bench import Setting
from ep_export.measure.journal import Interrupted, Journal, Workplace, journal_settings
from ep_export.measure.question import QuestionResult, WayResult
from ep_export.measure.ways import one_cut
from ep_export.policy import Keep

SETTING = Setting((one_cut(1, "divprune", Keep(ratio=0.5)),), draws=3, seed=0, max_new_tokens=4, device="cpu")


def result(key: str) -> QuestionResult:
    ways = {"1:divprune@0.5": WayResult((0.5,), (1.0,), "1")}
    return QuestionResult(key, 4, 2, 3, "yes", True, (1.0,), (1.0,), ways)


class FullDisk(io.StringIO):
    """Takes a few characters, as a disk does before it is full."""

    def write(self, text: str) -> int:
        super().write(text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **kw: FullDisk() if mode == "a" else opened(self, mode, **kw)
    )


def test_other_settings_start_another_journal_and_damage_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"seed": 0})
    journal.add(result("k"))
    assert Journal(tmp_path, {"seed": 0}).find("k") == result("k")
    assert Journal(tmp_path, {"seed": 1}).find("k") is None
    with journal.path.open("a") as stream:
        stream.write('{"key": "half')
    Journal(tmp_path, {"seed": 0}).add(result("l"))
    reread = Journal(tmp_path, {"seed": 0})
    assert [reread.find(key) for key in "kl"] == [result("k"), result("l")]
    assert len(reread) == 2


def test_a_line_that_cannot_be_written_ends_the_run(tmp_path: Path, full_disk: None) -> None:
    journal = Journal(tmp_path, {})
    with pytest.raises(UserError, match="No space left on device") as raised:
        journal.add(result("k"))
    assert str(journal.path) in str(raised.value)
    assert "free some space" in raised.value.hint
    assert journal.find("k") is None


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        Journal(tmp_path / "file" / "work", {})


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_changed_processor_files_start_another_journal(tmp_path: Path, file: str) -> None:
    path = make_tiny(tmp_path / "model")
    before = journal_settings(open_checkpoint(str(path)), SETTING)
    assert journal_settings(open_checkpoint(str(path)), SETTING) == before
    with (path / file).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    after = journal_settings(open_checkpoint(str(path)), SETTING)
    assert after["model"] == before["model"]
    assert after["processor"] != before["processor"]
    assert Journal(tmp_path / "work", before).path != Journal(tmp_path / "work", after).path


class TestWorkplace:
    """The journal's directory outlives a run exactly when it can serve another."""

    def test_it_is_gone_after_success(self, tmp_path: Path) -> None:
        with Workplace(tmp_path / "record.json") as work:
            Journal(work, {}).add(result("k"))
            assert work.is_dir()
        assert list(tmp_path.iterdir()) == []

    def test_it_stays_where_something_was_measured(self, tmp_path: Path) -> None:
        with pytest.raises(UserError), Workplace(tmp_path / "record.json") as work:
            Journal(work, {}).add(result("k"))
            raise UserError("no")
        assert Journal(work, {}).find("k") is not None

    def test_it_goes_where_nothing_was_measured(self, tmp_path: Path) -> None:
        with pytest.raises(UserError), Workplace(tmp_path / "record.json") as work:
            Journal(work, {})
            raise UserError("no")
        assert list(tmp_path.iterdir()) == []

    def test_other_files_in_a_directory_of_that_name_stay(self, tmp_path: Path) -> None:
        (tmp_path / ".record.json.work").mkdir()
        mine = [tmp_path / ".record.json.work" / name for name in ("notes.jsonl", "thesis.txt")]
        for file in mine:
            file.touch()
        with Workplace(tmp_path / "record.json") as work:
            Journal(work, {}).add(result("k"))
        assert sorted(work.iterdir()) == mine

    def test_a_directory_that_was_given_always_stays(self, tmp_path: Path) -> None:
        with Workplace(tmp_path / "record.json", tmp_path / "mine") as work:
            Journal(work, {}).add(result("k"))
        assert work == tmp_path / "mine"
        assert Journal(work, {}).find("k") is not None

    def test_without_an_output_nothing_stays(self) -> None:
        with pytest.raises(KeyboardInterrupt) as raised, Workplace(None) as work:
            Journal(work, {}).add(result("k"))
            raise KeyboardInterrupt
        assert not isinstance(raised.value, Interrupted)
        assert not work.exists()

    @pytest.mark.parametrize("measured", [True, False])
    def test_ctrl_c_promises_to_go_on_only_where_something_was_measured(
        self, tmp_path: Path, measured: bool
    ) -> None:
        with pytest.raises(KeyboardInterrupt) as raised, Workplace(tmp_path / "record.json") as work:
            journal = Journal(work, {})
            if measured:
                journal.add(result("k"))
            raise KeyboardInterrupt
        assert isinstance(raised.value, Interrupted) is measured
        assert ("goes on" in getattr(raised.value, "hint", "")) is measured

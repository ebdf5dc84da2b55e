"""Outputs are whole or absent, and nothing that ep-export did not write is ever deleted."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from ep_export.errors import UserError
from ep_export.staging import refuse_existing, scratch, set_aside, staged

MARKER = "manifest.json"


def stage(out, *, overwrite=False):
    return staged(out, overwrite=overwrite, marker=MARKER)


def write_output(directory, *files):
    """What a build writes, as far as replacing it is concerned: files, and a manifest that names them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    listed = [{"path": name, "bytes": len(name), "sha256": ""} for name in files]
    manifest = {"format": 1, "model": "tiny", "components": [], "files": listed}
    (directory / MARKER).write_text(json.dumps(manifest))
    return directory


def everything(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_what_was_built_appears_under_its_name(tmp_path):
    with stage(tmp_path / "out") as aside:
        (aside / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "whole"
    assert everything(tmp_path) == ["out", "out/file"]


def test_the_new_output_has_the_permissions_that_the_user_gives_new_folders(tmp_path):
    (tmp_path / "plain").mkdir()
    with stage(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_work_breaks_off(tmp_path, error):
    with pytest.raises(error), stage(tmp_path / "out") as aside:
        (aside / "file").write_text("half")
        raise error
    assert everything(tmp_path) == []


def test_an_existing_output_is_refused_before_work_starts(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already") as caught, stage(tmp_path / "out"):
        pytest.fail("must not start")
    assert "--overwrite" in caught.value.hint


def test_overwrite_replaces_the_old_output_only_at_the_end(tmp_path):
    write_output(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="broken"), stage(tmp_path / "out", overwrite=True):
        raise ValueError("broken")
    assert everything(tmp_path) == ["out", "out/manifest.json", "out/old"]
    with stage(tmp_path / "out", overwrite=True) as aside:
        (aside / "new").touch()
    assert everything(tmp_path) == ["out", "out/new"]


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with stage(tmp_path / "out", overwrite=True) as aside:
        (aside / "new").touch()
    assert everything(tmp_path) == ["out", "out/new"]


class TestWhatIsNotOurs:
    """Replacing deletes, so only what a run wrote is replaced."""

    @staticmethod
    def refused(out, match):
        before = everything(out.parent)
        with pytest.raises(UserError, match=match) as caught, stage(out, overwrite=True):
            pytest.fail("must not start")
        assert everything(out.parent) == before
        assert caught.value.hint

    def test_a_directory_of_somebody_else(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "diary.txt").touch()
        self.refused(tmp_path / "out", "was not made by ep-export")

    @pytest.mark.parametrize(
        "content",
        [
            '{"name": "a web app", "icons": [], "start_url": "/"}',
            '{"files": {"main.js": "main.1.js"}, "entrypoints": []}',
            '{"format": 1, "files": []}',
            "[]",
            "not JSON",
            "",
            "[" * 100_000,
        ],
    )
    def test_a_directory_whose_manifest_is_another_one(self, tmp_path, content):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / MARKER).write_text(content)
        self.refused(tmp_path / "out", "was not made by ep-export")

    def test_a_checkpoint(self, tmp_path):
        (tmp_path / "model").mkdir()
        for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
            (tmp_path / "model" / name).write_text("{}")
        self.refused(tmp_path / "model", "was not made by ep-export")

    @pytest.mark.parametrize(
        "name", ["holiday.jpg", "report/notes.txt", "a/b/c", "engines/me.engine", ".env"]
    )
    def test_a_file_that_the_manifest_does_not_name(self, tmp_path, name):
        out = write_output(tmp_path / "out", "decoder.onnx", "report/report.html")
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
        self.refused(out, f"holds {name}")

    def test_a_link_to_a_directory(self, tmp_path):
        out = write_output(tmp_path / "out", "decoder.onnx")
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "cat.png").touch()
        (out / "pictures").symlink_to(tmp_path / "pictures")
        self.refused(out, "holds pictures")

    def test_a_file_in_place_of_the_directory(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        self.refused(tmp_path / "out", "was not made by ep-export")

    def test_a_file_laid_there_during_the_work_keeps_both(self, tmp_path):
        out = write_output(tmp_path / "out", "old")
        with pytest.raises(UserError, match=r"holds diary\.txt") as caught, stage(out, overwrite=True) as new:
            (new / "new").touch()
            (out / "diary.txt").touch()
        assert str(tmp_path / "out.new") in str(caught.value)
        assert everything(out) == ["diary.txt", "manifest.json", "old"]
        assert everything(tmp_path / "out.new") == ["new"]
        assert names(tmp_path) == ["out", "out.new"]

    def test_what_appears_under_the_name_during_the_work_keeps_both(self, tmp_path):
        (tmp_path / "out.new").mkdir()
        with pytest.raises(UserError, match="exists already"), stage(tmp_path / "out") as new:
            (new / "new").touch()
            (tmp_path / "out").mkdir()
        assert everything(tmp_path) == ["out", "out.new", "out.new-2", "out.new-2/new"]

    def test_folders_beside_it_that_look_like_ours(self, tmp_path):
        for name in (".out.old", ".out.part", ".out.abcdef.part"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").touch()
        marked = tmp_path / ".out.ghijkl.part" / ".ep-export"
        marked.parent.mkdir()
        marked.write_text('{"made_by": "somebody", "out": "out", "pid": 1}')
        before = everything(tmp_path)
        write_output(tmp_path / "out", "old")
        with stage(tmp_path / "out", overwrite=True):
            pass
        assert everything(tmp_path) == sorted([*before, "out"])


def test_a_document_whose_writer_was_killed_is_ours_too(tmp_path):
    out = write_output(tmp_path / "out", "report/report.json")
    (out / ".manifest.json.part").touch()
    (out / "report" / ".report.json.part").touch()
    with stage(out, overwrite=True):
        pass
    assert everything(out) == []


@pytest.mark.parametrize("step", [1, 2])
def test_where_a_rename_fails_the_earlier_output_and_the_new_one_stay(tmp_path, monkeypatch, step):
    out = write_output(tmp_path / "out", "old")
    rename, done = Path.rename, []

    def fail_once(self, target):
        done.append(target)
        if len(done) == step:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with pytest.raises(UserError, match="Input/output error") as caught, stage(out, overwrite=True) as new:
        (new / "new").touch()
        monkeypatch.setattr(Path, "rename", fail_once)
    assert str(tmp_path / "out.new") in str(caught.value)
    assert everything(out) == ["manifest.json", "old"]
    assert everything(tmp_path / "out.new") == ["new"]
    assert names(tmp_path) == ["out", "out.new"]


def test_where_nothing_can_be_renamed_any_more_nothing_is_deleted(tmp_path, monkeypatch):
    out = write_output(tmp_path / "out", "old")

    def fail(self, target):
        raise OSError(5, "Input/output error")

    with (
        pytest.raises(UserError, match="could not be put into place") as caught,
        stage(out, overwrite=True) as new,
    ):
        (new / "new").touch()
        monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.undo()
    assert str(new) in str(caught.value)
    refuse_existing(out, overwrite=True, marker=MARKER)  # which collects what is left of runs
    assert (new / "new").exists()
    assert everything(out) == ["manifest.json", "old"]


def test_a_link_to_an_output_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "bundle")
    with stage(tmp_path / "out") as aside:
        write_output(aside, "first")
    assert everything(tmp_path / "disk") == ["bundle", "bundle/first", "bundle/manifest.json"]
    with stage(tmp_path / "out", overwrite=True) as aside:
        write_output(aside, "second")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "out" / "second").is_file()
    assert names(tmp_path / "disk") == ["bundle"]


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="leads back to itself"), stage(tmp_path / "out"):
        pytest.fail("must not start")


def test_the_root_is_refused():
    with pytest.raises(UserError, match="mount point"), stage(Path("/"), overwrite=True):
        pytest.fail("must not start")


def test_a_long_name_works_and_a_longer_one_is_refused_before_the_work(tmp_path):
    with stage(tmp_path / ("ü" * 127)):
        pass
    assert (tmp_path / ("ü" * 127)).is_dir()
    with pytest.raises(OSError, match="too long"), stage(tmp_path / ("ü" * 128)):
        pytest.fail("must not start")


RUN = """
    import os, signal, sys
    from pathlib import Path
    from ep_export import staging
    out, when = Path(sys.argv[1]), sys.argv[2]
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    rename = Path.rename
    def until(self, target):
        rename(self, target)
        if self.name == when:
            die()
        return target
    with staging.staged(out, overwrite=True, marker="manifest.json") as new:
        (new / "new").touch()
        if when == "working":
            die()
        if when == "waiting":
            print("ready", flush=True)
            sys.stdin.read()
        Path.rename = until
"""


def other_run(out, when, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), str(out), when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    ("when", "left"),
    [
        ("working", ["manifest.json", "old"]),
        ("out", ["manifest.json", "old"]),  # killed between the two renames
        ("new", ["new"]),  # killed right behind them
        ("old", ["new"]),
    ],
)
def test_what_a_killed_run_left_is_put_right_by_the_next_one(tmp_path, when, left):
    out = write_output(tmp_path / "out", "old")
    with other_run(out, when) as run:
        run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == (1 if when == "out" else 2)
    with stage(tmp_path / "another"):
        pass
    assert everything(out) == left
    assert names(tmp_path) == ["another", "out"]


def test_what_a_killed_run_replaced_does_not_push_out_what_was_put_there_since(tmp_path):
    out = write_output(tmp_path / "out", "old")
    with other_run(out, "out") as run:
        run.communicate(timeout=60)
    (out).mkdir()
    (out / "mine").touch()
    refuse_existing(tmp_path / "another", overwrite=False, marker=MARKER)
    assert everything(out) == ["mine"]
    [work] = tmp_path.glob(".out.*.part")
    assert everything(work / "old") == ["manifest.json", "old"]


def test_a_second_run_to_the_same_output_is_refused_and_one_to_another_is_not(tmp_path):
    out = tmp_path / "out"
    with other_run(out, "waiting") as run:
        assert run.stdout.readline() == "ready\n"
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"being made by another run, process {run.pid}"):
                refuse_existing(out, overwrite=overwrite, marker=MARKER)
        with stage(tmp_path / "another"):
            pass
        run.communicate("", timeout=60)
    assert run.returncode == 0
    assert everything(tmp_path) == ["another", "out", "out/new"]


@pytest.mark.parametrize(
    "content", [None, "", '{"made_by": "ep-export", "ou', '{"made_by": "ep-export", "out": "out"}']
)
def test_a_run_killed_before_its_mark_leaves_a_folder_that_the_next_one_collects(tmp_path, content):
    work = Path(tempfile.mkdtemp(prefix=".out.", suffix=".part", dir=tmp_path))
    if content is not None:
        (work / "mark").write_text(content)
    refuse_existing(tmp_path / "another", overwrite=False, marker=MARKER)
    assert names(tmp_path) == []


def test_a_run_killed_while_it_deletes_its_work_leaves_the_mark_for_last(tmp_path, monkeypatch):
    rmtree, deleted = shutil.rmtree, []

    def note(path, **options):
        deleted.append(sorted(file.name for file in Path(path).iterdir()))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", note)
    with pytest.raises(ValueError, match="broken"), stage(tmp_path / "out") as aside:
        (aside / "file").touch()
        raise ValueError("broken")
    assert deleted == [["file"], [".ep-export"]]


def test_what_only_resembles_an_unfinished_work_folder_stays(tmp_path):
    for name in (".mine.part", ".out.ABCDEFGH.part"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcdefgh.part").mkdir()
    (tmp_path / ".out.abcdefgh.part" / "mark").write_text("of somebody")
    (tmp_path / ".out.12345678.part").touch()
    before = everything(tmp_path)
    refuse_existing(tmp_path / "another", overwrite=False, marker=MARKER)
    assert everything(tmp_path) == before


def test_what_was_made_can_be_set_aside_and_the_earlier_output_stays(tmp_path):
    out = write_output(tmp_path / "out", "old")
    for name in ("out.failed", "out.failed-2"):
        with stage(out, overwrite=True) as aside:
            (aside / "new").touch()
            assert set_aside(aside, out, suffix="failed") == tmp_path / name
    assert everything(out) == ["manifest.json", "old"]
    assert names(tmp_path) == ["out", "out.failed", "out.failed-2"]
    assert everything(tmp_path / "out.failed") == ["new"]


def test_work_in_an_output_leaves_nothing_in_it_and_is_done_by_one_at_a_time(tmp_path):
    out = write_output(tmp_path / "out", "old")
    with scratch(out, "report") as aside:
        (aside / "new").touch()
        with pytest.raises(UserError, match="being made by another run"), scratch(out, "report"):
            pytest.fail("must not start")
    assert everything(out) == ["manifest.json", "old"]


def test_what_a_run_killed_at_work_in_an_output_left_hinders_nobody(tmp_path):
    out = write_output(tmp_path / "out", "old")
    work = out / ".report.abcdefgh.part"
    (work / "new").mkdir(parents=True)
    (work / ".ep-export").write_text(json.dumps({"made_by": "ep-export", "out": "report", "pid": 1}))
    with stage(out, overwrite=True) as aside:
        write_output(aside, "new")
    assert everything(out) == ["manifest.json", "new"]


def test_ctrl_c_the_moment_the_work_folder_exists_leaves_nothing(tmp_path, monkeypatch):
    make = tempfile.mkdtemp

    def interrupted(**options):
        folder = make(**options)
        signal.raise_signal(signal.SIGINT)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), stage(tmp_path / "out"):
            raise AssertionError("the block was entered")
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []

"""A full disk, a read-only one, two runs at once, a clock that jumps: a sentence, or the same result."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from command_line import ep_export
from tiny import make_tiny, tiny_picture

from ep_export.calibrate.record import read_calibration


def _namespaces() -> bool:
    """Whether a file system of our own can be mounted, out of everybody's sight."""
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


own_disk = pytest.mark.skipif(not _namespaces(), reason="no mount namespaces here: not root, or no unshare")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surroundings")
    make_tiny(folder / "tiny", layers=3, vision_depth=1, vision_full_blocks=(0,))
    (folder / "pictures").mkdir()
    for number in range(3):
        tiny_picture(112, 84, seed=number).save(folder / "pictures" / f"{number}.png")
    return folder


def verb(name: str, here: Path, *options: str) -> list[str]:
    own = {
        "calibrate": ["--images", str(here / "pictures"), "--layers", "1"],
        "export": ["--layer", "1", "--shards", "copy"],
    }
    return [name, "--model", str(here / "tiny"), "--keep", "0.5", *own[name], *options]


@own_disk
@pytest.mark.parametrize(
    ("name", "out", "disk"),
    [
        ("export", "bundle", "size=400k"),  # not even the weights
        ("export", "bundle", "size=weights"),  # full at the graphs
        ("calibrate", "record.json", "size=4k"),  # a page: full within the journal
        ("calibrate", "record.json", "size=16k"),  # within record and plot
        ("export", "bundle", "ro"),
        ("calibrate", "record.json", "ro"),
    ],
)
def test_a_disk_that_takes_no_more_is_told_in_one_line_and_nothing_half_is_left(
    here: Path, tmp_path: Path, name: str, out: str, disk: str
) -> None:
    (tmp_path / "disk").mkdir()
    weights = (here / "tiny" / "model.safetensors").stat().st_size
    disk = disk.replace("weights", str(weights + (64 << 10)))
    command = [sys.executable, "-m", "ep_export", *verb(name, here, "--out", f"disk/{out}")]
    script = 'mount -t tmpfs -o "$1" tmpfs disk && shift && { "$@"; code=$?; ls -A disk; exit $code; }'
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", disk, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert len(errors) == 2, run.stderr
    assert ("cannot be" if disk == "ro" else "no space") in errors[0].lower()
    assert "Traceback" not in run.stderr
    left = set(run.stdout.split())
    assert left <= {f".{out}.work"}, "only what the same command goes on with"


def test_a_second_run_to_an_output_that_is_being_made_is_refused(here: Path, tmp_path: Path) -> None:
    journals = tmp_path / ".record.json.work"
    journals.mkdir()
    handle = os.open(journals, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        second = ep_export(*verb("calibrate", here, "--out", str(tmp_path / "record.json")))
    finally:
        os.close(handle)
    assert second.code == 1
    assert f"{journals} is in use by another run" in second.err
    assert ep_export(*verb("calibrate", here, "--out", str(tmp_path / "record.json"))).code == 0


def test_two_exports_to_one_output_at_once_make_one_bundle(here: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ep_export", *verb("export", here, "--out", "bundle")]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=300)[1] for run in both]
    codes = [run.returncode for run in both]
    assert sorted(codes) == [0, 1], said
    refusal = said[codes.index(1)]
    assert "being made by another run" in refusal or "exists already" in refusal
    assert ep_export("inspect", str(tmp_path / "bundle")).code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_a_clock_that_jumps_changes_nothing(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = [tmp_path / name for name in ("steady.json", "jumping.json")]
    assert ep_export(*verb("calibrate", here, "--out", str(outs[0]))).code == 0
    now, rng = time.time, Random(0)  # noqa: S311 - not a secret
    with monkeypatch.context() as jumping:
        jumping.setattr(time, "time", lambda: now() + rng.uniform(-1e8, 1e8))
        assert ep_export(*verb("calibrate", here, "--out", str(outs[1]))).code == 0
        assert ep_export(*verb("export", here, "--out", str(tmp_path / "bundle"))).code == 0
        again = ep_export(*verb("export", here, "--out", str(tmp_path / "bundle"), "--overwrite"))
    assert again.code == 0, again.err
    steady, jumped = (json.loads(out.read_text()) for out in outs)
    for record in (steady, jumped):
        record["provenance"].pop("date")
    assert steady == jumped
    assert read_calibration(outs[1]).images == 3
    shutil.rmtree(tmp_path / "bundle")

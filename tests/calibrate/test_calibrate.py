"""The whole calibration on a tiny random model, broken input and interruptions included."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny import make_tiny, tiny_picture

from ep_export.calibrate import calibrate, plot, read_record
from ep_export.calibrate import run as run_module
from ep_export.calibrate.journal import Journal, PictureResult
from ep_export.calibrate.questions import questions_for, read_questions
from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.errors import UsageError, UserError
from ep_export.policy import EvidenceKind, Keep, Policy

KEEP = Keep(ratio=0.5)
SETTINGS = {"keep": KEEP, "prompts": ("What is in the picture?",), "max_new_tokens": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return open_checkpoint(str(make_tiny(path, layers=4, heads=4, vision_depth=1, vision_full_blocks=(0,))))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        tiny_picture(112, 84 + 28 * (i % 2), seed=i).save(folder / f"p{i}.png")
    (folder / "labels.txt").write_text("not a picture and no mistake")
    return folder


@pytest.fixture(scope="module")
def out(checkpoint: Checkpoint, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "record.json"
    calibrate(checkpoint, images, **SETTINGS, out=out)
    return out


def test_record_is_complete_and_its_journal_is_gone(checkpoint: Checkpoint, out: Path) -> None:
    record = read_record(out)
    assert (record.layers, record.images, record.keep) == (4, 4, KEEP)
    assert record.fingerprint == checkpoint.fingerprint
    assert record.provenance.kind is EvidenceKind.MEASURED
    assert {"torch", "transformers", "ep-export"} <= set(record.provenance.tools)
    assert len(record.query_entropy) == len(record.key_entropy) == len(record.query_spread) == 4
    assert all(0 < value < math.log(64) for value in record.query_entropy)
    # keep 0.5 of 4 layers: K = 1 and 2; four scores, two directions and the floor at each
    assert [c.layer for c in record.candidates] == [1] * 9 + [2] * 9
    assert [c.scorer for c in record.candidates].count("random") == 2
    for candidate in record.candidates:
        assert 0 < candidate.kl_low <= candidate.kl <= candidate.kl_high
        assert 0 <= candidate.top1_agreement <= 1
    assert record.collapse_finding
    assert record.recommendation
    assert sorted(path.name for path in out.parent.iterdir()) == ["record.json", "record.png"]


def test_same_settings_give_the_same_record(checkpoint: Checkpoint, images: Path, out: Path) -> None:
    again = calibrate(checkpoint, images, **SETTINGS)
    first = read_record(out)
    assert again.candidates == first.candidates
    assert again.query_entropy == first.query_entropy


def test_interrupted_run_goes_on_where_it_stopped(
    checkpoint: Checkpoint, images: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = run_module._measure, []

    def interrupt(*args, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(run_module, "_measure", interrupt)
    target = tmp_path / "record.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, images, **SETTINGS, out=target)
    assert not target.exists()
    journal = next((tmp_path / ".record.json.work").iterdir())
    journal.write_bytes(journal.read_bytes()[:-20])  # as if the machine had stopped within the second line

    seen.clear()
    monkeypatch.setattr(run_module, "_measure", lambda *a, **k: (seen.append(1), measure(*a, **k))[1])
    record = calibrate(checkpoint, images, **SETTINGS, out=target)
    assert len(seen) == 3  # the first picture was not measured again, the second was
    assert record.candidates == read_record(out).candidates
    assert not (tmp_path / ".record.json.work").exists()


def test_broken_and_repeated_pictures_are_skipped_and_named(
    checkpoint: Checkpoint, images: Path, tmp_path: Path
) -> None:
    good = (images / "p0.png").read_bytes()
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(good)
    (tmp_path / "b.jpg").write_bytes(b"this is no picture")
    (tmp_path / "c.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "d.png").write_bytes(b"")
    (tmp_path / "sub" / "e.png").write_bytes(good)
    steps: list[tuple[int, int]] = []
    record = calibrate(
        checkpoint,
        tmp_path,
        **SETTINGS,
        layers=[1],
        progress=lambda _, done, total: steps.append((done, total)),
    )
    assert record.images == 1
    assert [line.split(":")[0] for line in record.skipped] == ["b.jpg", "c.png", "d.png", "sub/e.png"]
    assert "the same picture as a.png" in record.skipped[-1]
    assert record.ecl is None  # one picture proves nothing
    assert record.recommended is None
    assert steps == [(i, 5) for i in range(6)]


@pytest.mark.parametrize("kind", ["missing", "empty", "unreadable"])
def test_folder_without_a_usable_picture_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "pictures"
    if kind != "missing":
        folder.mkdir()
    if kind == "unreadable":
        (folder / "a.png").write_bytes(b"no")
    expected = {
        "missing": "does not exist",
        "empty": "holds no picture",
        "unreadable": r"none of the 1 .* a\.png",
    }
    with pytest.raises(UserError, match=expected[kind]) as caught:
        calibrate(checkpoint, folder, **SETTINGS, out=tmp_path / "record.json")
    assert caught.value.hint
    assert not (tmp_path / "record.json").exists()


def test_impossible_keep_and_layers_are_refused_before_the_model_is_loaded(
    checkpoint: Checkpoint, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_on", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"below the smallest possible, 0\.25"):
        calibrate(checkpoint, images, keep=Keep(ratio=0.1))
    with pytest.raises(UsageError, match="expected 1 to 3"):
        calibrate(checkpoint, images, keep=KEEP, layers=[4])
    with pytest.raises(UsageError, match="expected 0 < keep <= 1"):
        calibrate(checkpoint, images, keep=Keep(ratio=0.0))


@pytest.mark.parametrize("out", ["folder", "record.png", "folder/file/record.json"])
def test_output_that_cannot_be_written_is_refused_before_any_measurement(
    checkpoint: Checkpoint, images: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("in the way")
    monkeypatch.setattr(run_module, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError) as caught:
        calibrate(checkpoint, images, **SETTINGS, out=tmp_path / out)
    assert caught.value.hint


def test_device_that_is_not_there_is_a_user_error(checkpoint: Checkpoint, images: Path) -> None:
    with pytest.raises(UserError, match="device nonsense cannot be used"):
        calibrate(checkpoint, images, **SETTINGS, device="nonsense")


def test_keep_one_compares_nothing_and_says_so(checkpoint: Checkpoint, images: Path) -> None:
    record = calibrate(
        checkpoint, images, keep=Keep(ratio=1.0), prompts=["What?"], max_new_tokens=1, max_images=2
    )
    assert record.candidates == ()
    assert record.recommended == Policy(1)
    assert "nothing is dropped" in record.recommendation
    assert record.images == 2


def test_token_budget_is_measured_at_its_average_ratio(checkpoint: Checkpoint, images: Path) -> None:
    record = calibrate(
        checkpoint,
        images,
        keep=Keep(tokens=6),
        prompts=["What?"],
        max_new_tokens=1,
        max_images=2,
        layers=[1, 3],
    )
    # 12 or 16 tokens a picture: layer 3 alone would see 9 of them
    assert {candidate.layer for candidate in record.candidates} == {1}
    assert 6 / 16 <= record.candidates[0].keep <= 6 / 12


def test_plot_shows_records_with_and_without_a_collapse(out: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from PIL import Image

    record = read_record(out)
    plot(record, tmp_path / "none.png")
    plot(replace(record, ecl=2, confidence=0.97, candidates=()), tmp_path / "some.png")
    with Image.open(tmp_path / "none.png") as wide, Image.open(tmp_path / "some.png") as narrow:
        assert wide.width > 1.5 * narrow.width
        assert np.asarray(wide.convert("L")).std() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.png", "some.png"]


def test_questions_come_from_a_list_in_turn_or_a_mapping_by_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(["a?", "b?"]))
    listed = read_questions(file)
    assert [questions_for(listed, "x.png", turn) for turn in range(3)] == [("a?",), ("b?",), ("a?",)]
    file.write_text(json.dumps({"sub/x.png": "one?", "y.png": ["two?", "three?"]}))
    mapped = read_questions(file)
    assert questions_for(mapped, "sub/x.png", 7) == ("one?",)
    assert questions_for(mapped, "deep/y.png", 0) == ("two?", "three?")
    with pytest.raises(UserError, match=r"asks nothing of z\.png"):
        questions_for(mapped, "z.png", 0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '"one"', "[1]", '{"a.png": []}', '[" "]', '{"a.png": [3]}']
)
def test_prompts_file_without_questions_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"prompts\.json"):
        read_questions(file)


def test_other_settings_start_another_journal_and_damage_is_cut_off(tmp_path: Path) -> None:
    result = PictureResult("k", 4, 2, (1.0,), (1.0,), {"1/paper/highest": 0.5}, {"1/paper/highest": 1.0})
    journal = Journal(tmp_path, {"seed": 0})
    journal.add(result)
    assert Journal(tmp_path, {"seed": 0}).find("k") == result
    assert Journal(tmp_path, {"seed": 1}).find("k") is None
    with journal.path.open("a") as stream:
        stream.write('{"key": "half')
    reread = Journal(tmp_path, {"seed": 0})
    reread.add(PictureResult("l", 4, 2, (1.0,), (1.0,), {}, {}))
    assert Journal(tmp_path, {"seed": 0}).find("l") is not None
    assert Journal(tmp_path, {"seed": 0}).find("k") == result

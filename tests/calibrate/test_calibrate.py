"""The whole calibration on a tiny random model, broken input and interruptions included."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from tiny import make_tiny, tiny_picture

from ep_export.calibrate import calibrate, plot, read_calibration
from ep_export.calibrate import measuring as measuring_module
from ep_export.calibrate import run as calibrate_module
from ep_export.calibrate.candidates import candidate_ways
from ep_export.calibrate.figure import is_our_plot
from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.entropy import METRICS
from ep_export.errors import UsageError, UserError
from ep_export.measure import executors as run_module
from ep_export.policy import Cut, EvidenceKind, Keep, Schedule

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
    record = read_calibration(out)
    assert (record.layers, record.images, record.keep) == (4, 4, KEEP)
    assert record.fingerprint == checkpoint.fingerprint
    assert record.provenance.kind is EvidenceKind.MEASURED
    assert {"torch", "transformers", "ep-export"} <= set(record.provenance.tools)
    assert len(record.query_entropy) == len(record.key_entropy) == len(record.query_spread) == 4
    assert all(0 < value < math.log(64) for value in record.query_entropy)
    # keep 0.5 of 4 layers: K = 0, 1 and 2, where every chooser that can stand there is compared
    ways = candidate_ways([0, 1, 2], KEEP)
    assert [c.schedule for c in record.candidates] == [way.schedule for way in ways]
    assert [c.policy for c in record.candidates].count("random") == 3
    assert {c.images for c in record.candidates} == {4}
    for candidate in record.candidates:
        assert 0 < candidate.kl_low <= candidate.kl <= candidate.kl_high
        assert 0 <= candidate.top1_agreement <= 1
    assert record.collapse_finding
    assert record.recommendation
    assert "4 pictures are too few, 8 are needed" in record.horizon.finding
    assert record.horizons == ()  # the prompts name no kinds
    assert [curve.metric for curve in record.metrics] == [metric.key for metric in METRICS]
    assert "of 6 detectors" in record.detectors
    assert sorted(path.name for path in out.parent.iterdir()) == ["record.json", "record.png"]


def test_same_settings_give_the_same_record(checkpoint: Checkpoint, images: Path, out: Path) -> None:
    again = calibrate(checkpoint, images, **SETTINGS)
    first = read_calibration(out)
    assert again.candidates == first.candidates
    assert again.query_entropy == first.query_entropy


def test_interrupted_run_goes_on_where_it_stopped(
    checkpoint: Checkpoint, images: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = run_module.measure, []

    def interrupt(*args, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(run_module, "measure", interrupt)
    target = tmp_path / "record.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, images, **SETTINGS, out=target)
    assert not target.exists()
    journal = next((tmp_path / ".record.json.work").iterdir())
    journal.write_bytes(journal.read_bytes()[:-20])  # as if the machine had stopped within the second line

    seen.clear()
    monkeypatch.setattr(run_module, "measure", lambda *a, **k: (seen.append(1), measure(*a, **k))[1])
    record = calibrate(checkpoint, images, **SETTINGS, out=target)
    assert len(seen) == 3 + 4  # the first picture was not measured again, the second was; then the race
    assert record.candidates == read_calibration(out).candidates
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
        progress=lambda stage, done, total: steps.append((done, total)) if stage == "measuring" else None,
    )
    assert record.images == 1
    assert [line.split(":")[0] for line in record.skipped] == ["b.jpg", "c.png", "d.png", "sub/e.png"]
    assert "the same picture as a.png" in record.skipped[-1]
    assert record.ecl is None  # one picture proves nothing
    assert record.recommended is None
    # what is no picture is only seen when it is asked about; a copy never is
    assert steps == [(i, 4) for i in range(5)]


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
    monkeypatch.setattr(measuring_module, "make_bench", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"below the smallest possible, 0\.25"):
        calibrate(checkpoint, images, keep=Keep(ratio=0.1), layers=[1, 2])
    with pytest.raises(UsageError, match="expected 0 to 3"):
        calibrate(checkpoint, images, keep=KEEP, layers=[4])
    with pytest.raises(UsageError, match="expected 0 < keep <= 1"):
        calibrate(checkpoint, images, keep=Keep(ratio=0.0))


@pytest.mark.parametrize("out", ["folder", "record.png", "folder/file/record.json"])
def test_output_that_cannot_be_written_is_refused_before_any_measurement(
    checkpoint: Checkpoint, images: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("in the way")
    monkeypatch.setattr(run_module, "measure", lambda *_, **__: pytest.fail("measured"))
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
    assert record.recommended == Schedule((Cut(1),))
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


def test_enough_pictures_give_a_horizon_and_schedules_of_two_cuts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The random model's answers hardly depend on the picture, so tokens can go early."""
    for i in range(8):
        tiny_picture(84, 84, seed=i).save(tmp_path / f"p{i}.png")
    asked = [{"question": "What?", "kind": "naming"}, {"question": "How many?", "kind": "counting"}]
    told: list[str] = []
    record = calibrate(
        checkpoint,
        tmp_path,
        keep=KEEP,
        prompts={f"p{i}.png": asked for i in range(8)},
        max_new_tokens=1,
        layers=[0, 1],
        announce=told.append,
    )
    assert record.horizon.layer is not None
    assert [(one.kind, one.images) for one in record.horizons] == [("counting", 8), ("naming", 8)]
    mean = np.mean([one.everything.kl for one in record.horizons], axis=0)
    np.testing.assert_allclose(mean, record.horizon.everything.kl, rtol=1e-4)  # one answer position each
    two = [c for c in record.candidates if c.second is not None]
    assert two
    assert {c.second.layer for c in two} <= {record.horizon.half.horizon, record.horizon.everything.horizon}
    assert any("comparing" in line for line in told)
    plot(record, tmp_path / "record.png")
    assert is_our_plot(tmp_path / "record.png")


def test_plot_shows_records_with_and_without_a_collapse(out: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from PIL import Image

    record = read_calibration(out)
    plot(record, tmp_path / "none.png")
    plain = replace(record, ecl=2, confidence=0.97, candidates=(), metrics=(), horizon=None)
    plot(plain, tmp_path / "some.png")
    with Image.open(tmp_path / "none.png") as wide, Image.open(tmp_path / "some.png") as narrow:
        assert wide.width > 1.5 * narrow.width
        assert np.asarray(wide.convert("L")).std() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.png", "some.png"]


def test_several_questions_of_a_picture_weigh_by_their_answer_s_length(
    checkpoint: Checkpoint, images: Path
) -> None:
    """Means over all answer positions of a picture, from the two questions measured apart."""
    texts = ["What is this?", "How many are there?"]
    setting = {"keep": KEEP, "max_new_tokens": 3, "layers": [2], "max_images": 1}
    alone = [calibrate(checkpoint, images, **setting, prompts=[text]) for text in texts]
    together = calibrate(checkpoint, images, **setting, prompts={f"p{i}.png": texts for i in range(4)})
    for one, other, both in zip(*(record.candidates for record in (*alone, together)), strict=True):
        low, high = sorted((one.kl, other.kl))
        assert low <= both.kl <= high
    assert together.images == 1


def test_picture_with_a_question_that_cannot_be_asked_is_left_out_whole(
    checkpoint: Checkpoint, images: Path
) -> None:
    long = "what " * 5000
    prompts = {"p0.png": ["What?", long], "p1.png": ["What?"], "p2.png": ["What?"]}
    record = calibrate(checkpoint, images, keep=KEEP, max_new_tokens=1, layers=[1], prompts=prompts)
    assert record.images == 2
    assert [line.split(":")[0] for line in record.skipped] == ["p0.png", "p3.png"]


def test_changed_processor_files_are_another_measurement(tmp_path: Path, images: Path) -> None:
    """A smaller picture limit is no reason to take up, or to trust, what was measured before."""
    path = make_tiny(tmp_path / "model", layers=4, heads=4, vision_depth=1, vision_full_blocks=(0,))
    work = tmp_path / "work"
    short = {**SETTINGS, "layers": [1], "max_images": 1}
    before = calibrate(open_checkpoint(str(path)), images, **short, work=work)
    config = path / "preprocessor_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, **_smaller(raw)}))
    after = calibrate(open_checkpoint(str(path)), images, **short, work=work)
    assert len(list(work.iterdir())) == 4  # a journal for the horizon and one for the race, each time
    assert after.fingerprint == before.fingerprint
    assert after.processor != before.processor
    assert after.candidates != before.candidates


def _smaller(raw: dict) -> dict:
    """The largest picture cut to 6 visual tokens, under whichever name the file has it."""
    limit = 6 * 28 * 28
    if "size" in raw:
        return {"size": {**raw["size"], "longest_edge": limit}}
    return {"max_pixels": limit}


class TestOutput:
    """Record and plot appear together or not at all, over nothing that is not theirs."""

    short: ClassVar = {**SETTINGS, "layers": [1], "max_images": 1}

    def test_a_picture_that_is_no_plot_is_not_replaced(
        self, checkpoint, images, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setattr(run_module, "measure", lambda *_, **__: pytest.fail("measured"))
        photo = tmp_path / "photo.png"
        tiny_picture(56, 56).save(photo)
        before = photo.read_bytes()
        with pytest.raises(UserError, match=r"would replace .*photo\.png") as caught:
            calibrate(checkpoint, images, **self.short, out=tmp_path / "photo.json")
        assert "--out" in caught.value.hint
        assert photo.read_bytes() == before
        (tmp_path / "other.png").write_bytes(b"no picture at all")
        assert not is_our_plot(tmp_path / "other.png")

    def test_an_earlier_plot_is_replaced(self, checkpoint, images, out, tmp_path) -> None:
        plot(read_calibration(out), tmp_path / "mine.png")
        before = (tmp_path / "mine.png").read_bytes()
        calibrate(checkpoint, images, **self.short, out=tmp_path / "mine.json")
        assert (tmp_path / "mine.png").read_bytes() != before
        assert is_our_plot(tmp_path / "mine.png")

    def test_a_plot_that_fails_leaves_no_record(self, checkpoint, images, tmp_path, monkeypatch) -> None:
        def fail(record, path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        out = tmp_path / "record.json"
        with monkeypatch.context() as broken:
            broken.setattr(calibrate_module, "plot", fail)
            with pytest.raises(OSError, match="No space left"):
                calibrate(checkpoint, images, **self.short, out=out)
        assert [path.name for path in tmp_path.iterdir()] == [".record.json.work"]
        monkeypatch.setattr(run_module, "measure", lambda *_, **__: pytest.fail("measured again"))
        calibrate(checkpoint, images, **self.short, out=out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json", "record.png"]

    def test_a_failure_leaves_an_earlier_record_and_plot(
        self, checkpoint, images, out, tmp_path, monkeypatch
    ) -> None:
        for suffix in (".json", ".png"):
            shutil.copy(out.with_suffix(suffix), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fail(record, path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(calibrate_module, "plot", fail)
        with pytest.raises(OSError, match="No space left"):
            calibrate(checkpoint, images, **self.short, out=tmp_path / "record.json")
        shutil.rmtree(tmp_path / ".record.json.work")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_full_disk_ends_the_run_and_blames_no_picture(
        self, checkpoint, images, tmp_path, monkeypatch
    ) -> None:
        class Full(io.StringIO):
            def write(self, _text: str) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        opened = Path.open
        monkeypatch.setattr(
            Path, "open", lambda path, mode="r", **kw: Full() if mode == "a" else opened(path, mode, **kw)
        )
        with pytest.raises(UserError, match="measurements cannot be written"):
            calibrate(checkpoint, images, **SETTINGS, layers=[1], out=tmp_path / "record.json")
        assert list(tmp_path.iterdir()) == []  # nothing was measured, so nothing stays to go on from

"""A whole sweep of the trained model on a handful of questions: complete, resumable, honest about gaps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import ep_export
from digit_scenes import READING, make_scene, questions
from tiny import tiny_picture
from tiny_llava import make_tiny_llava_next

from ep_export.calibrate import read_record
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UsageError, UserError
from ep_export.methods import METHODS as METHODS_ALL
from ep_export.methods import find_methods
from ep_export.sweep import SweepOptions, read_asking, read_sweep, sweep, workers
from ep_export.sweep import run as run_module
from ep_export.sweep.calibrated import Calibration

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
METHODS = find_methods(("paper-highest", "norm-lowest", "fastv", "divprune", "random"))
OPTIONS = SweepOptions(
    keeps=(0.25,),
    layers=(2,),
    methods=METHODS,
    seeds=2,
    timed_prompts=1,
    gallery_pictures=2,
    max_new_tokens=8,
)
QUESTIONS = 5


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(str(READER))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Five pictures with a question each, and everything that can go wrong beside them."""
    folder = tmp_path_factory.mktemp("asked") / "scenes"
    folder.mkdir()
    prompts = {}
    for index in range(QUESTIONS):
        scene = make_scene("test", index=index, seed=6, size=(224, 224))
        scene.picture.save(folder / f"{index}.png")
        asked = next(q for q in questions(scene) if q.kind == READING[index])
        prompts[f"{index}.png"] = {"question": asked.text, "answer": asked.answer}
    (folder / "broken.png").write_bytes(b"not a picture")
    prompts["broken.png"] = {"question": "How many digits are there?", "answer": "1"}
    prompts["0.png"] = [prompts["0.png"], {"question": "What is this?", "answer": "a zebra"}]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture(scope="module")
def asking(images):
    return read_asking(images / "prompts.json")


@pytest.fixture(scope="module")
def done(checkpoint, images, asking, tmp_path_factory):
    """(directory, record, what was announced) of an undisturbed sweep with a calibration of its own."""
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    pictures = tmp_path_factory.mktemp("calibration")
    for index in range(4):
        make_scene("calibration", index=index, seed=6, size=(224, 224)).picture.save(
            pictures / f"{index}.png"
        )
    told: list[str] = []
    options = replace(OPTIONS, calibration=Calibration(images=pictures, prompts=("List the digits.",)))
    sweep(checkpoint, images, asking, out=out, options=options, announce=told.append)
    return out, read_sweep(out), told


def test_every_combination_has_a_row(done) -> None:
    _, record, told = done
    assert (record.dataset.questions, record.dataset.pictures, record.dataset.answers) == (5, 5, True)
    inside = {"paper-highest", "norm-lowest", "fastv", "divprune", "random"}
    assert {row.method for row in record.rows if row.layer == 0} == {"divprune", "random"}
    assert inside <= {row.method for row in record.rows if row.layer == 2}
    for row in record.rows:
        assert row.seeds == len(row.right) == (2 if row.method == "random" else 1)
        assert row.accuracy.low <= row.accuracy.value <= row.accuracy.high
        assert row.accuracy.value == pytest.approx("".join(row.right).count("1") / (5 * row.seeds))
        assert row.kl.low <= row.kl.value <= row.kl.high
        assert row.flops < record.unpruned.flops
        assert row.kv_bytes <= row.keep * record.unpruned.kv_bytes * 1.0001
        assert row.prefill.samples == 3
        assert bool(row.versus) == (row.method != "random")
    published = {(row.method, row.layer): row.published for row in record.rows}
    assert published["divprune", 0]
    assert published["divprune", 2] is False
    assert published["fastv", 2]
    assert published["paper-highest", 2] is None
    assert len(record.entropies.query) == 12
    assert record.unpruned.prefill_ms > 0
    assert told[0].startswith("7 questions")


def test_what_could_not_be_used_is_named_and_counted(done) -> None:
    _, record, _ = done
    names = {skipped.name: skipped.reason for skipped in record.dataset.skipped}
    assert len(names) == 2
    assert "is not a picture Pillow can read" in names["broken.png: How many digits are there?"]
    assert "cannot write the answer 'a zebra'" in names["0.png: What is this?"]


def test_the_recommendation_competes_and_is_judged_in_hindsight(done) -> None:
    _, record, _ = done
    assert [one.keep for one in record.recommended] == [0.25]
    for one in record.recommended:
        assert one.held_out is True
        assert one.pictures == 4
        if one.policy is None:
            assert record.row("recommended", 2, one.keep) is None
            continue
        row = record.row("recommended", one.policy.layer, one.keep)
        assert row.found_by == str(one.policy)
        best = record.row(one.best_method, one.best_layer, one.keep)
        assert one.regret_kl.value == pytest.approx(row.kl.value - best.kl.value, abs=1e-6)


def test_the_gallery_shows_what_was_kept(done) -> None:
    out, record, _ = done
    assert len(record.gallery) == 2
    for entry in record.gallery:
        assert (out / entry.picture).is_file()
        (part,) = entry.parts
        assert part.token_grid == (8, 8)
        for answer in entry.answers:
            assert all(0 <= cell < 64 for cell in answer.kept_cells[0])
            row = record.row(answer.method, answer.layer, answer.keep)
            assert len(answer.kept_cells[0]) == row.kept_tokens  # every picture here has 64 tokens
    marks = {(a.method, a.layer, a.keep): a.right for a in record.gallery[0].answers}
    for (method, layer, keep), right in marks.items():  # the first question is the first of the gallery
        assert record.row(method, layer, keep).right[0][0] == "01"[right]


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    checkpoint, images, asking, done, tmp_path, monkeypatch
) -> None:
    measure, seen = workers.measure, []

    def interrupt(*args, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(workers, "measure", interrupt)
    out = tmp_path / "sweep"
    with pytest.raises(KeyboardInterrupt):
        sweep(checkpoint, images, asking, out=out, options=OPTIONS)
    assert not out.exists()
    monkeypatch.setattr(workers, "measure", lambda *a, **k: (seen.append(1), measure(*a, **k))[1])
    sweep(checkpoint, images, asking, out=out, options=OPTIONS)
    # two at first (one was refused for its answer), then all that was not in the journal
    assert len(seen) == 2 + 6
    again = read_sweep(out)
    for row in again.rows:
        before = done[1].row(row.method, row.layer, row.keep)
        assert (row.right, row.kl, row.agreement) == (before.right, before.kl, before.agreement)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]  # the journal is gone


def test_a_killed_process_leaves_a_journal_that_serves(images, tmp_path, monkeypatch) -> None:
    """SIGKILL, which nothing can catch, in the middle of the questions."""
    measure = workers.measure
    out = tmp_path / "sweep"
    verb = [
        "sweep",
        "--model",
        str(READER),
        "--images",
        str(images),
        "--prompts",
        str(images / "prompts.json"),
    ]
    verb += ["--keep", "0.25", "--layer", "1", "--methods", "norm-lowest,random", "--timed-prompts", "0"]
    verb += ["--out", str(out), "--json"]
    command = [sys.executable, "-m", "ep_export", *verb]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while _lines(tmp_path) < 1 and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert _lines(tmp_path) >= 1
    asked = []
    monkeypatch.setattr(workers, "measure", lambda *a, **k: (asked.append(1), measure(*a, **k))[1])
    result = ep_export(*verb)
    assert result.code == 0, result.err
    assert len(asked) < QUESTIONS + 2
    record = json.loads(result.out)
    assert record["dataset"]["questions"] == QUESTIONS
    assert "7 questions x" in result.err
    assert (out / "sweep.json").is_file()


def _lines(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.glob(".sweep.work/*.jsonl"))


def test_several_processes_find_the_same(checkpoint, images, asking, done, tmp_path) -> None:
    options = replace(OPTIONS, methods=METHODS[:1], jobs=2, timed_prompts=0, gallery_pictures=0)
    record = sweep(checkpoint, images, asking, out=tmp_path / "sweep", options=options)
    assert record.gallery == ()
    assert record.dataset == done[1].dataset
    (row,) = record.rows
    before = done[1].row(row.method, row.layer, row.keep)
    assert (row.right, row.agreement) == (before.right, before.agreement)
    assert row.kl.value == pytest.approx(
        before.kl.value, abs=1e-5
    )  # batches of another size round differently


def test_a_process_that_dies_is_told_in_one_line(images, asking, checkpoint, tmp_path) -> None:
    recipe = workers.Recipe(
        checkpoint=tmp_path,  # no model there: a worker cannot start
        spots=(),
        methods=(),
        recommended=(),
        seeds=1,
        seed=0,
        max_new_tokens=1,
        device="cpu",
        threads=1,
    )
    with pytest.raises(UserError, match="one of 1 processes died"):
        list(workers.ask_in_processes(recipe, [workers.Task(None, entropies=False)], jobs=1))


def test_without_answers_fidelity_is_all_there_is(checkpoint, images, tmp_path) -> None:
    options = SweepOptions(
        keeps=(0.25,), layers=(2,), methods=METHODS[:2], timed_prompts=0, gallery_pictures=1, max_questions=2
    )
    record = sweep(checkpoint, images, ["List the digits."], out=tmp_path / "sweep", options=options)
    assert not record.dataset.answers
    assert record.unpruned.accuracy is None
    for row in record.rows:
        assert row.accuracy is None
        assert row.right == ()
        assert row.prefill is None
    assert record.gallery[0].answer is None
    assert record.gallery[0].full_right is None
    assert record.recommended == ()
    assert read_sweep(tmp_path / "sweep") == record


def test_a_family_with_tiles_and_tokens_that_stand_for_no_place(tmp_path) -> None:
    """LLaVA-NeXT: one axis of positions, several views of a picture, newline tokens between rows."""
    model = open_checkpoint(str(make_tiny_llava_next(tmp_path / "model")))
    (tmp_path / "images").mkdir()
    tiny_picture(140, 100).save(tmp_path / "images" / "0.png")
    options = SweepOptions(keeps=(0.5,), timed_prompts=1, gallery_pictures=1, max_new_tokens=3)
    record = sweep(model, tmp_path / "images", ["What is this?"], out=tmp_path / "sweep", options=options)
    assert {row.method for row in record.rows} == {method.key for method in METHODS_ALL}
    (entry,) = record.gallery
    for answer in entry.answers:
        for part, cells in zip(entry.parts, answer.kept_cells, strict=True):
            assert all(0 <= cell < part.token_grid[0] * part.token_grid[1] for cell in cells)


def test_mistakes_are_found_before_the_model_is_loaded(
    checkpoint, images, asking, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(run_module, "make_bench", lambda *_, **__: pytest.fail("loaded"))
    out = tmp_path / "sweep"
    with pytest.raises(UsageError, match="below the smallest possible"):
        sweep(checkpoint, images, asking, out=out, options=SweepOptions(keeps=(0.01,)))
    with pytest.raises(UsageError, match="expected 1 to 11"):
        sweep(checkpoint, images, asking, out=out, options=SweepOptions(keeps=(0.5,), layers=(12,)))
    with pytest.raises(UserError, match="does not exist"):
        sweep(checkpoint, tmp_path / "none", asking, out=out, options=OPTIONS)
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="was not made by ep-export"):
        sweep(checkpoint, images, asking, out=out, options=OPTIONS, overwrite=True)


def test_a_record_of_another_model_recommends_nothing_here(checkpoint, images, asking, tmp_path) -> None:
    shipped = sorted((Path(__file__).parents[2] / "calibration" / "records").glob("*.json"))
    assert read_record(shipped[0]).layers != 12
    options = SweepOptions(keeps=(0.5,), calibration=Calibration(records=(shipped[0],)))
    with pytest.raises(UserError, match="another model"):
        sweep(checkpoint, images, asking, out=tmp_path / "sweep", options=options)

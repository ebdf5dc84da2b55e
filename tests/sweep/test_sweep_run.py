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

from ep_export.calibrate import read_calibration
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UsageError, UserError
from ep_export.measure import executors as measure_module
from ep_export.measure.executors import Processes
from ep_export.measure.prompts import read_prompts
from ep_export.methods import METHODS as METHODS_ALL
from ep_export.methods import find_methods
from ep_export.policy import Cut, MaxMin, Random, Schedule
from ep_export.sweep import SweepOptions, read_sweep, sweep
from ep_export.sweep import run as run_module
from ep_export.sweep.recommended import Calibration

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
METHODS = find_methods(("paper-highest", "norm-lowest", "fastv", "divprune", "random"))
OPTIONS = SweepOptions(
    keeps=(0.25,),
    layers=(2,),
    methods=METHODS,
    schedule=Schedule((Cut(2, MaxMin(), 0.1), Cut(6, Random(), 0.05))),
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
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    folder.mkdir()
    entries = {}
    for index in range(QUESTIONS):
        scene = make_scene("test", index=index, seed=6, size=(224, 224))
        scene.picture.save(folder / f"{index}.png")
        question = next(q for q in questions(scene) if q.kind == READING[index])
        entries[f"{index}.png"] = {"question": question.text, "answer": question.answer}
    (folder / "broken.png").write_bytes(b"not a picture")
    entries["broken.png"] = {"question": "How many digits are there?", "answer": "1"}
    entries["0.png"] = [entries["0.png"], {"question": "What is this?", "answer": "a zebra"}]
    (folder / "prompts.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def prompts(images):
    return read_prompts(images / "prompts.json")


@pytest.fixture(scope="module")
def done(checkpoint, images, prompts, tmp_path_factory):
    """(directory, record, what was announced) of an undisturbed sweep with a calibration of its own."""
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    pictures = tmp_path_factory.mktemp("calibration")
    for index in range(4):
        make_scene("calibration", index=index, seed=6, size=(224, 224)).picture.save(
            pictures / f"{index}.png"
        )
    told: list[str] = []
    options = replace(OPTIONS, calibration=Calibration(images=pictures, prompts=("List the digits.",)))
    sweep(checkpoint, images, prompts, out=out, options=options, announce=told.append)
    return out, read_sweep(out), told


def test_every_combination_has_a_row(done) -> None:
    _, record, told = done
    assert (record.dataset.questions, record.dataset.pictures, record.dataset.answers) == (5, 5, True)
    inside = {"paper-highest", "norm-lowest", "norm-highest-attention", "divprune", "random"}
    assert {row.method for row in record.rows if row.layer == 0} == {"divprune", "random"}
    assert inside <= {row.method for row in record.rows if row.layer == 2}
    for row in record.rows:
        assert row.seeds == len(row.right) == (2 if row.method in {"random", "schedule"} else 1)
        assert row.accuracy.low <= row.accuracy.value <= row.accuracy.high
        assert row.accuracy.value == pytest.approx("".join(row.right).count("1") / (5 * row.seeds))
        assert row.kl.low <= row.kl.value <= row.kl.high
        assert row.flops < record.unpruned.flops
        # fitted to other pictures, an adaptive keep is bound by its ceiling alone
        most = 2 * row.keep if row.method == "adaptive" else row.keep
        assert row.kv_bytes <= most * record.unpruned.kv_bytes * 1.0001
        assert row.prefill.samples == 3
        assert (row.over_random is None) == (row.method == "random")
    published = {(row.method, row.layer): row.published for row in record.rows}
    assert published["divprune", 0]
    assert published["divprune", 2] is False
    assert published["norm-highest-attention", 2]
    assert published["paper-highest", 2] is None
    assert len(record.entropies.query) == 12
    assert record.unpruned.prefill_ms > 0
    assert told[0].startswith("7 questions")


def test_what_could_not_be_used_is_named_and_counted(done) -> None:
    _, record, _ = done
    names = {skipped.name: skipped.reason for skipped in record.dataset.skipped}
    assert len(names) == 2
    assert "is not a picture" in names["broken.png: How many digits are there?"]
    assert "cannot write the answer 'a zebra'" in names["0.png: What is this?"]


def test_the_recommendation_competes_and_is_judged_in_hindsight(done) -> None:
    _, record, _ = done
    assert [one.keep for one in record.recommended] == [0.25]
    for one in record.recommended:
        assert one.held_out is True
        assert one.pictures == 4
        if one.schedule is None:
            assert record.row("recommended", 2, one.keep) is None
            continue
        (cut,) = one.schedule.cuts
        row = record.row("recommended", cut.layer, one.keep)
        assert [(one.layer, one.method) for one in row.cuts] == [(cut.layer, cut.chooser.name)]
        best = record.row(one.best_method, one.best_layer, one.keep)
        assert one.regret_kl.value == pytest.approx(row.kl.value - best.kl.value, abs=1e-6)


def test_the_gallery_shows_what_was_kept(done) -> None:
    out, record, _ = done
    assert len(record.gallery) == 2
    for entry in record.gallery:
        assert (out / entry.picture).is_file()
        for answer in entry.answers:
            (part,) = answer.kept
            row = record.row(answer.method, answer.layer, answer.keep)
            assert part.token_grid == (8, 8)
            if answer.method != "adaptive":  # every picture here has 64 tokens
                assert tuple(map(len, part.kept_by_cut)) == row.kept_tokens
            assert part.kept_tokens == part.kept_by_cut[-1]
    shown = {(a.method, a.layer, a.keep): a.right for a in record.gallery[0].answers}
    assert {"schedule", "divprune", "norm-lowest"} <= {method for method, _, _ in shown}
    for (method, layer, keep), right in shown.items():  # the first question is the first of the gallery
        assert record.row(method, layer, keep).right[0][0] == "01"[right]


def test_a_schedule_of_two_cuts_competes_with_the_same_budget(done) -> None:
    _, record, _ = done
    row = record.row("schedule", 2, 0.25)
    assert [(cut.layer, cut.method) for cut in row.cuts] == [(2, "divprune"), (6, "random")]
    first, second = row.kept_tokens
    # layers 0 and 1 see 64 tokens, four see the first share, six the second: a quarter on average
    assert (2 * 64 + 4 * first + 6 * second) / 12 == pytest.approx(16, abs=1)
    assert row.kv_bytes / record.unpruned.kv_bytes == pytest.approx(0.25, abs=0.01)
    assert record.method("schedule").ours


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    checkpoint, images, prompts, done, tmp_path, monkeypatch
) -> None:
    measure, seen = measure_module.measure, []

    def interrupt(*args, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(measure_module, "measure", interrupt)
    out = tmp_path / "sweep"
    with pytest.raises(KeyboardInterrupt):
        sweep(checkpoint, images, prompts, out=out, options=OPTIONS)
    assert not out.exists()
    monkeypatch.setattr(measure_module, "measure", lambda *a, **k: (seen.append(1), measure(*a, **k))[1])
    sweep(checkpoint, images, prompts, out=out, options=OPTIONS)
    # two at first (one was refused for its answer), then all that was not in the journal
    assert len(seen) == 2 + 6
    again = read_sweep(out)
    for row in again.rows:
        before = done[1].row(row.method, row.layer, row.keep)
        assert (row.right, row.kl, row.agreement) == (before.right, before.kl, before.agreement)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]  # the journal is gone


def test_a_killed_process_leaves_a_journal_that_serves(images, tmp_path, monkeypatch) -> None:
    """SIGKILL, which nothing can catch, in the middle of the questions."""
    measure = measure_module.measure
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
    measured = []
    monkeypatch.setattr(measure_module, "measure", lambda *a, **k: (measured.append(1), measure(*a, **k))[1])
    result = ep_export(*verb)
    assert result.code == 0, result.err
    assert len(measured) < QUESTIONS + 2
    record = json.loads(result.out)
    assert record["dataset"]["questions"] == QUESTIONS
    assert "7 questions x" in result.err
    assert (out / "sweep.json").is_file()


def _lines(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.glob(".sweep.work/*.jsonl"))


def test_several_processes_find_the_same(checkpoint, images, prompts, done, tmp_path) -> None:
    options = replace(
        OPTIONS,
        methods=METHODS[:1],
        schedule=None,
        executor=Processes(2),
        timed_prompts=0,
        gallery_pictures=0,
    )
    record = sweep(checkpoint, images, prompts, out=tmp_path / "sweep", options=options)
    assert record.gallery == ()
    assert record.dataset == done[1].dataset
    (row,) = record.rows
    before = done[1].row(row.method, row.layer, row.keep)
    assert (row.right, row.agreement) == (before.right, before.agreement)
    assert row.kl.value == pytest.approx(
        before.kl.value, abs=1e-5
    )  # batches of another size round differently


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
    # a picture of several views has too many tokens however small it is
    missing = {"scaled", "visionzip"}
    assert {row.method for row in record.rows} == {method.key for method in METHODS_ALL} - missing
    assert any("visionzip is left out: visual tokens of llava_next are no runs" in n for n in record.notes)
    alone = replace(options, methods=find_methods(("visionzip",)))
    with pytest.raises(UsageError, match="visionzip is left out"):
        sweep(model, tmp_path / "images", ["What is this?"], out=tmp_path / "other", options=alone)
    assert any("scaled at keep 0.5 is left out: no picture is small enough" in n for n in record.notes)
    assert record.scarce
    (entry,) = record.gallery
    for answer in entry.answers:
        for part in answer.kept:
            assert all(0 <= cell < part.token_grid[0] * part.token_grid[1] for cell in part.kept_tokens)


def test_mistakes_are_found_before_the_model_is_loaded(
    checkpoint, images, prompts, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(run_module, "make_bench", lambda *_, **__: pytest.fail("loaded"))
    out = tmp_path / "sweep"
    with pytest.raises(UsageError, match="below the smallest possible"):
        sweep(checkpoint, images, prompts, out=out, options=SweepOptions(keeps=(0.01,)))
    with pytest.raises(UsageError, match="expected 0 to 11"):
        sweep(checkpoint, images, prompts, out=out, options=SweepOptions(keeps=(0.5,), layers=(12,)))
    with pytest.raises(UserError, match="does not exist"):
        sweep(checkpoint, tmp_path / "none", prompts, out=out, options=OPTIONS)
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="was not made by ep-export"):
        sweep(checkpoint, images, prompts, out=out, options=OPTIONS, overwrite=True)


def test_a_record_of_another_model_recommends_nothing_here(checkpoint, images, prompts, tmp_path) -> None:
    shipped = sorted((Path(__file__).parents[2] / "calibration" / "records").glob("*.json"))
    assert read_calibration(shipped[0]).layers != 12
    options = SweepOptions(keeps=(0.5,), calibration=Calibration(records=(shipped[0],)))
    with pytest.raises(UserError, match="is for a model of"):
        sweep(checkpoint, images, prompts, out=tmp_path / "sweep", options=options)


@pytest.mark.parametrize("measured", [0, 2])
def test_ctrl_c_promises_to_go_on_only_where_something_was_measured(
    images, tmp_path, monkeypatch, measured
) -> None:
    measure, calls = measure_module.measure, []

    def interrupt(*args, **kwargs):
        if len(calls) == measured:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(measure_module, "measure", interrupt)
    prompts = ("--prompts", str(images / "prompts.json"))
    options = ("--keep", "0.25", "--layer", "1", "--methods", "norm-lowest", "--out", str(tmp_path / "sweep"))
    result = ep_export("sweep", "--model", str(READER), "--images", str(images), *prompts, *options)
    assert result.code == 130
    assert "interrupted" in result.err
    assert ("goes on with what was measured" in result.err) is bool(measured)
    assert bool(list(tmp_path.iterdir())) is bool(measured)

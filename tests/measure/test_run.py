"""Many questions: resumed, refused by name, in several processes, and ended by what cannot be mended."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
from measuring import question_about
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.errors import UserError
from ep_export.measure import executors
from ep_export.measure import run as run_module
from ep_export.measure.bench import Setting
from ep_export.measure.executors import InProcess, Job, Processes, Unit
from ep_export.measure.journal import Journal
from ep_export.measure.question import Question, QuestionResult, Skipped
from ep_export.measure.run import measure_all
from ep_export.measure.ways import one_cut
from ep_export.policy import Keep

SETTING = Setting(
    (one_cut(1, "norm-lowest", Keep(ratio=0.5)), one_cut(2, "random", Keep(ratio=0.6))),
    draws=2,
    seed=0,
    max_new_tokens=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return open_checkpoint(str(make_tiny(path, layers=4, heads=4, vision_depth=1, vision_full_blocks=(0,))))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Two about one picture, one about another, one about a broken file."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        tiny_picture(112, 84, seed=number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    texts = [("0.png", "What is this?"), ("0.png", "Where is it?"), ("1.png", "What is this?")]
    return [question_about(folder / name, text) for name, text in [*texts, ("broken.png", "What?")]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions as they are measured in this process."""
    texts: list[str] = []
    measure = executors.measure

    def note(bench, question, **kwargs):
        texts.append(question.name)
        return measure(bench, question, **kwargs)

    monkeypatch.setattr(executors, "measure", note)
    return texts


def test_every_question_has_a_result_or_a_reason(checkpoint, questions, tmp_path) -> None:
    steps = []
    outcomes = measure_all(
        checkpoint,
        SETTING,
        questions,
        work=tmp_path,
        stage="asking",
        progress=lambda *step: steps.append(step),
    )
    assert [type(outcome) for outcome in outcomes] == [QuestionResult] * 3 + [Skipped]
    assert [outcome.key for outcome in outcomes[:3]] == [question.key for question in questions[:3]]
    assert outcomes[3].name == "broken.png: What?"
    assert "is not a picture" in outcomes[3].reason
    assert [bool(outcome.query_entropy) for outcome in outcomes[:3]] == [True, False, True]
    assert steps == [("asking", done, 4) for done in range(5)]
    assert [len(outcomes[0].ways[way.key].kl) for way in SETTING.ways] == [1, 2]


def test_what_the_journal_knows_is_not_measured_again(checkpoint, questions, tmp_path, measured) -> None:
    first = measure_all(checkpoint, SETTING, questions[:1], work=tmp_path)
    again = measure_all(checkpoint, SETTING, questions[:3], work=tmp_path)
    assert again[0] == first[0]
    assert measured == [question.name for question in questions[:3]]
    measure_all(checkpoint, replace(SETTING, seed=1), questions[:1], work=tmp_path)
    assert measured[3:] == [questions[0].name]


def test_entropies_missing_from_the_journal_are_measured(checkpoint, questions, tmp_path, measured) -> None:
    measure_all(checkpoint, SETTING, questions[:2], work=tmp_path)
    (outcome,) = measure_all(checkpoint, SETTING, questions[1:2], work=tmp_path)
    assert measured == [questions[0].name, questions[1].name, questions[1].name]
    assert outcome.query_entropy


def test_a_question_that_comes_twice_is_measured_once(checkpoint, questions, tmp_path, measured) -> None:
    twice = measure_all(checkpoint, SETTING, [questions[0], questions[0]], work=tmp_path)
    assert twice[0] == twice[1]
    assert len(measured) == 1


def test_a_journal_that_cannot_be_written_ends_the_run_and_blames_no_picture(
    checkpoint, questions, tmp_path, measured, monkeypatch
) -> None:
    def full(self, result) -> None:
        raise UserError("measurements cannot be written")

    monkeypatch.setattr(Journal, "add", full)
    with pytest.raises(UserError, match="measurements cannot be written"):
        measure_all(checkpoint, SETTING, questions, work=tmp_path)
    assert measured == [questions[0].name]


def test_a_device_that_is_not_there_is_told_once(checkpoint, questions, tmp_path) -> None:
    setting = replace(SETTING, device="abacus")
    for executor in (InProcess(), Processes(2)):
        with pytest.raises(UserError, match="device abacus cannot be used"):
            measure_all(checkpoint, setting, questions, work=tmp_path, executor=executor)


def test_a_model_that_no_process_can_open_is_told_in_one_line(checkpoint, questions, tmp_path) -> None:
    gone = replace(checkpoint, path=tmp_path / "gone")
    with pytest.raises(UserError, match="gone"):
        measure_all(gone, SETTING, questions, work=tmp_path, executor=Processes(2))


def test_a_process_that_dies_is_told_in_one_line(checkpoint, questions, tmp_path) -> None:
    unusable = Job(
        checkpoint, replace(SETTING, ways=None)
    )  # no mistake of a person: the process ends with it
    units = [Unit(question, entropies=False) for question in questions]
    with pytest.raises(UserError, match="one of 2 processes died") as raised:
        list(Processes(2).run(unusable, units))
    assert "fewer --jobs" in raised.value.hint


def test_what_one_process_began_several_finish_although_one_dies(checkpoint, questions, tmp_path) -> None:
    alone = measure_all(checkpoint, SETTING, questions, work=tmp_path / "alone")
    killed = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    def kill_one(stage: str, done: int, total: int) -> None:
        if done == 2 and not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    work = tmp_path / "together"
    with pytest.raises(KeyboardInterrupt):
        measure_all(checkpoint, SETTING, questions, work=work, progress=interrupt)
    together = measure_all(
        checkpoint, SETTING, questions, work=work, executor=Processes(2), progress=kill_one
    )
    assert killed
    assert together == alone
    (journal,) = work.iterdir()
    assert len(journal.read_text().splitlines()) == 3  # each measured question once


def test_the_time_that_is_left_is_told_once_it_is_known() -> None:
    told: list[str] = []
    clock = run_module._Clock(40, told.append)
    for number in range(1, 41):
        clock.tick(number)
    assert len(told) == 1
    assert "to go" in told[0]

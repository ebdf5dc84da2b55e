"""The trained models on held-out questions: ONNX Runtime keeps and says what the PyTorch oracle does.

The oracle scores in float64 with eigenvalues, the bundle in float32 with a series. Sets may therefore differ
among near-ties, and an answer may follow; the limits are shares over 200 questions at each keep.
"""

from pathlib import Path

import numpy as np
import pytest
from bundles import export_tiny
from digit_scenes import LOOKING_UP, held_out

from ep_export.checkpoint import open_checkpoint
from ep_export.planning import average_keep
from ep_export.policy import Coverage, Cut, Keep, MaxMin, Nothing, Schedule, Scorer, Select, TopK
from ep_export.reference import PruneSpec, greedy, load_model, prune
from ep_export.runtime import Session

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
FINDER = READER.with_name("digit-finder")
LAYER = 1  # the only one that allows keep 0.125 with 12 layers
QUESTIONS = 200
MAX_NEW_TOKENS = 8
LEAST_OVERLAP = 0.998
LEAST_SAME_ANSWERS = 0.99


@pytest.fixture(scope="module")
def reader():
    checkpoint = open_checkpoint(str(READER))
    return checkpoint, load_model(checkpoint)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    bundle = export_tiny(READER, tmp_path_factory.mktemp("reader") / "bundle", layer=LAYER)
    with Session.open(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def session_of_two_cuts(tmp_path_factory):
    """DivPrune before the decoder, then the paper's score in the middle of it."""
    schedule = Schedule((Cut(0, MaxMin(), 0.5), Cut(6, TopK(), 0.2)))
    out = tmp_path_factory.mktemp("two-cuts") / "bundle"
    keep = average_keep(schedule, layers=12)
    with Session.open(export_tiny(READER, out, schedule=schedule, keep=keep.ratio)) as opened:
        yield opened


@pytest.fixture(scope="module")
def asked(session):
    """(picture, question text, prompt) of every held-out question."""
    scenes = held_out(QUESTIONS, seed=1)
    return [(s.picture, q.text, session.prompts.build([s.picture], q.text)) for s, q in scenes]


@pytest.mark.parametrize("ratio", [0.5, 0.125])
def test_the_bundle_keeps_and_answers_as_the_oracle(reader, session, asked, ratio):
    assert_keeps_and_answers_as_the_oracle(reader, session, asked, Keep(ratio=ratio))


def test_a_bundle_of_two_cuts_keeps_and_answers_as_the_oracle(reader, session_of_two_cuts, asked):
    keep = session_of_two_cuts.bundle.manifest.keep
    assert_keeps_and_answers_as_the_oracle(reader, session_of_two_cuts, asked[::2], keep)


def assert_keeps_and_answers_as_the_oracle(reader, session, asked, keep):
    checkpoint, model = reader
    spec = PruneSpec(session.bundle.manifest.schedule, keep)
    overlaps, same = [], 0
    for picture, question, prompt in asked:
        answer = session.generate([picture], question, max_new_tokens=MAX_NEW_TOKENS, keep=keep)
        with prune(model, spec) as trace:
            expected = greedy(model, checkpoint.family, checkpoint.config, prompt, MAX_NEW_TOKENS)
        for theirs, ours in zip(trace.cuts, answer.cuts, strict=True):
            overlaps.append(np.isin(theirs.kept_visual, ours.kept_index).mean())
        same += list(answer.token_ids) == expected
    assert np.mean(overlaps) >= LEAST_OVERLAP
    assert same >= LEAST_SAME_ANSWERS * len(asked)


def test_the_second_model_answers_what_takes_a_look(tmp_path):
    """What the first one guesses at; through a bundle, pruned at two cuts. 98.0 % of 300 on its card."""
    schedule = Schedule((Cut(1, Coverage(Scorer.NORM, Select.LOWEST), 0.5), Cut(11, Nothing())))
    bundle = export_tiny(FINDER, tmp_path / "bundle", schedule=schedule, keep=0.5)
    questions = list(held_out(60, seed=1, kinds=LOOKING_UP))
    with Session.open(bundle) as session:
        right = sum(
            session.generate([s.picture], q.text, max_new_tokens=MAX_NEW_TOKENS).answer == q.answer
            for s, q in questions
        )
    assert right >= 0.9 * len(questions)

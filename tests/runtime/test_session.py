"""A bundle opened for questions: what comes back, what is refused, and that torch is not needed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_picture

from ep_export.bundle import Bundle, write_manifest
from ep_export.documents import encode
from ep_export.errors import UsageError, UserError
from ep_export.plan import kept_tokens
from ep_export.policy import Keep
from ep_export.runtime import Finish, Runner, Session

QUESTION = "What is in this picture?"


@pytest.fixture(scope="module")
def session(tiny_bundle):
    with Session.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def answer(session):
    return session.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=6)


def test_an_answer_says_what_it_took(session, answer):
    assert answer.visual_tokens == 35
    assert answer.answer == session.prompts.decode(answer.token_ids)
    assert len(answer.token_ids) == 6
    assert (answer.finish, answer.keep) == (Finish.LENGTH, session.bundle.manifest.keep)
    assert set(answer.timings_ms) >= {
        "vision",
        "embed",
        "head_prefill",
        "tail_prefill",
        "decode_per_token",
        "total",
    }
    stages = sum(
        value for name, value in answer.timings_ms.items() if name not in {"total", "decode_per_token"}
    )
    assert 0 < stages <= answer.timings_ms["total"]


def test_text_is_never_dropped_and_the_budget_is_met(session, answer):
    prompt = session.prompts.build([tiny_picture(200, 130)], QUESTION)
    text = np.setdiff1d(np.arange(answer.prompt_tokens), prompt.visual_index)
    assert set(text.tolist()) <= set(answer.kept_index)
    kept = kept_tokens(answer.keep, layers=4, layer=2, visual_tokens=35)
    assert len(answer.kept_index) == text.shape[0] + kept
    assert list(answer.kept_index) == sorted(answer.kept_index)


def test_kept_tokens_are_told_for_each_picture(session):
    pictures = [tiny_picture(120, 60, seed=1), tiny_picture(60, 150, seed=2)]
    made = session.generate(pictures, QUESTION, max_new_tokens=1)
    prompt = session.prompts.build(pictures, QUESTION)
    kept = np.concatenate([picture.kept for picture in made.pictures])
    assert np.array_equal(prompt.visual_index[kept], np.intersect1d(prompt.visual_index, made.kept_index))
    assert [p.token_grid for p in made.pictures] == [p.token_grid for p in prompt.pictures]
    assert made.pictures[0].kept.shape == (made.pictures[0].token_grid[0] * made.pictures[0].token_grid[1],)


def test_an_answer_is_plain_json(answer):
    raw = json.loads(json.dumps(encode(answer), allow_nan=False))
    assert raw["token_ids"] == list(answer.token_ids)
    assert {"answer", "prompt_tokens", "visual_tokens", "kept_index", "timings_ms"} <= set(raw)


def test_tokens_are_told_as_they_come(session, answer):
    told = []
    session.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=6, on_token=told.append)
    assert tuple(told) == answer.token_ids


def test_an_end_token_ends_the_answer_and_is_part_of_it(session, answer, monkeypatch):
    monkeypatch.setattr(session.prompts, "eos_token_ids", (answer.token_ids[2],))
    made = session.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=6)
    assert made.token_ids == answer.token_ids[:3]
    assert made.finish is Finish.END


def test_keep_is_chosen_at_run_time(session):
    counts = {}
    for ratio in (0.6, 0.8, 1.0):
        made = session.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=1, keep=Keep(ratio=ratio))
        counts[ratio] = len(made.kept_index)
    assert counts[0.6] < counts[0.8] < counts[1.0] == made.prompt_tokens


def test_prefill_shows_every_stage(session):
    prompt = session.prompts.build([tiny_picture(90, 60), tiny_picture(60, 60)], QUESTION)
    made = session.prefill(prompt, Keep(ratio=0.8))
    length, kept, width = prompt.input_ids.shape[1], made.kept_index.shape[0], 64
    assert made.inputs_embeds.shape == (1, length, width)
    assert made.hidden_states.shape == (1, kept, width)
    assert np.array_equal(made.kept_position_ids, prompt.position_ids[:, :, made.kept_index])
    assert np.array_equal(made.inputs_embeds[0, prompt.visual_index], np.concatenate(made.visual_embeds))
    lengths = {name: value.shape[2] for name, value in made.caches.items()}
    assert lengths == {
        f"past_key_values.{layer}.{part}": length if layer < 2 else kept
        for layer in range(4)
        for part in ("key", "value")
    }


def test_a_component_runs_alone(session):
    embeds = session.run("embed_tokens", {"input_ids": np.array([[3, 1]])})["inputs_embeds"]
    assert embeds.shape == (1, 2, 64)
    with pytest.raises(UserError, match="no component 'decoder'"):
        session.run("decoder", {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max-new-tokens is 0"),
        ({"keep": Keep(ratio=0.1)}, "keep"),
        ({"keep": Keep(ratio=1.5)}, "keep"),
        ({"keep": Keep(ratio=float("nan"))}, "keep"),
    ],
)
def test_impossible_requests_are_refused(session, options, said):
    with pytest.raises(UsageError, match=said):
        session.generate([tiny_picture(60, 60)], QUESTION, **{"max_new_tokens": 1, **options})


def shorter(bundle, positions):
    """The same bundle with a smaller context in its manifest."""
    dims = dataclasses.replace(bundle.manifest.dims, max_positions=positions)
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, dims=dims))


def test_the_context_bounds_prompt_and_answer(tiny_bundle, answer):
    with Session.open(shorter(tiny_bundle, answer.prompt_tokens + 2), threads=1) as opened:
        made = opened.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=6)
    assert made.token_ids == answer.token_ids[:3]  # the last one needs no position of its own
    assert made.finish is Finish.CONTEXT
    with (
        Session.open(shorter(tiny_bundle, answer.prompt_tokens - 1), threads=1) as opened,
        pytest.raises(UserError, match=rf"prompt has {answer.prompt_tokens} tokens, .* holds"),
    ):
        opened.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=1)


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_bundle_without_processor_files_is_refused(copy, tiny_bundle, name):
    (copy / "processor" / name).unlink()
    with pytest.raises(UserError, match=name.removesuffix(".json")):
        Session.open(Bundle(copy, tiny_bundle.manifest))


def test_a_bundle_with_a_broken_graph_is_refused(copy, tiny_bundle):
    (copy / "decoder_tail.onnx").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"cannot load decoder_tail\.onnx"):
        Session.open(Bundle(copy, tiny_bundle.manifest))


def test_a_bundle_that_lost_its_weights_is_refused(copy, tiny_bundle):
    shutil.rmtree(copy / "weights")
    with pytest.raises(UserError, match="cannot load"):
        Session.open(Bundle(copy, tiny_bundle.manifest))


def test_what_was_opened_is_closed_when_a_later_component_fails(tiny_bundle):
    closed = []

    class Fake(Runner):
        input_names = output_names = ()

        def __init__(self, file: Path) -> None:
            if file.name == "decoder_tail.onnx":
                raise UserError("no")
            self.name = file.stem

        def run(self, feeds):
            raise AssertionError(feeds)

        def close(self):
            closed.append(self.name)

    with pytest.raises(UserError, match="no"):
        Session.open(tiny_bundle, runner=Fake)
    assert set(closed) == {"vision_encoder", "embed_tokens", "decoder_head"}


def test_a_bundle_answers_where_torch_and_onnx_are_not_installed(tiny_bundle, session, tmp_path):
    tiny_picture(90, 60).save(tmp_path / "picture.png")
    program = Path(__file__).with_name("without_torch.py")
    done = subprocess.run(
        [sys.executable, program, tiny_bundle.path, tmp_path / "picture.png"],
        check=True,
        capture_output=True,
        text=True,
    )
    said = json.loads(done.stdout)
    assert said["loaded"] == []
    here = session.generate([tiny_picture(90, 60)], "which digits?", max_new_tokens=5)
    assert tuple(said["token_ids"]) == here.token_ids


def test_another_default_keep_in_the_manifest_is_followed(copy, tiny_bundle):
    write_manifest(copy, dataclasses.replace(tiny_bundle.manifest, keep=Keep(tokens=20)))
    with Session.open(Bundle.open(copy, verify=False), threads=1) as opened:
        made = opened.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=1)
    assert len(made.pictures[0].kept_tokens) == kept_tokens(
        Keep(tokens=20), layers=4, layer=2, visual_tokens=35
    )

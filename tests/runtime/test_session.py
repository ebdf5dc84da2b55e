"""A bundle opened for questions: what comes back, what is refused, and that torch is not needed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import export_tiny, two_cuts
from tiny import tiny_picture

from ep_export.adaptive import fit_threshold
from ep_export.bundle import Bundle, Role, write_manifest
from ep_export.documents import encode
from ep_export.errors import UsageError, UserError
from ep_export.planning import kept_tokens
from ep_export.policy import Cut, Keep, MaxMin, Nothing, Random, Schedule, Scorer, Select, Source, TopK
from ep_export.runtime import Finish, OnnxRuntimeRunner, Runner, Session

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
    assert set(answer.timings_ms) == {
        "prepare",
        "vision",
        "embed",
        "prefill",
        "prune",
        "first_token",
        "decode",
        "decode_per_token",
        "total",
    }
    sums = {"first_token", "decode_per_token", "total"}
    stages = sum(value for name, value in answer.timings_ms.items() if name not in sums)
    assert 0 < stages <= answer.timings_ms["total"]


def test_text_is_never_dropped_and_the_budget_is_met(session, answer):
    prompt = session.prompts.build([tiny_picture(200, 130)], QUESTION)
    text = np.setdiff1d(np.arange(answer.prompt_tokens), prompt.visual_index)
    assert set(text.tolist()) <= set(answer.kept_index)
    (kept,) = kept_tokens(answer.keep, session.bundle.manifest.schedule, layers=4, visual_tokens=35)
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
    prefill = session.prefill(prompt, Keep(ratio=0.8))
    (cut,) = prefill.cuts
    length, kept, width = prompt.input_ids.shape[1], prefill.kept_index.shape[0], 64
    assert prefill.inputs_embeds.shape == (1, length, width)
    assert (cut.layer, cut.policy) == (2, "paper-highest")
    assert cut.hidden_states.shape == (1, kept, width)
    assert cut.scores.shape == prompt.visual_index.shape
    assert np.array_equal(cut.kept_index, prefill.kept_index)
    assert np.array_equal(cut.position_ids.numpy(), prompt.position_ids[:, :, prefill.kept_index])
    embeds = np.concatenate(prefill.visual_embeds)
    assert np.array_equal(prefill.inputs_embeds[0, prompt.visual_index], embeds)
    lengths = {name: value.shape[2] for name, value in prefill.caches.items()}
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


@pytest.fixture(scope="module")
def twice(tiny_checkpoint, tmp_path_factory):
    """Cuts before layers 1 and 3 of 4, and policies of every kind."""
    return export_tiny(
        tiny_checkpoint,
        tmp_path_factory.mktemp("twice") / "bundle",
        schedule=two_cuts(1, 3),
        keep=0.6,
        policies=(MaxMin(), Nothing(), Random(3), TopK(Scorer.NORM, Select.LOWEST, Source.HIDDEN)),
    )


@pytest.fixture(scope="module")
def cutter(twice):
    with Session.open(twice, threads=1) as opened:
        yield opened


def by_hand(session, prompt, policies):
    """Kept prompt positions at every cut, from runs of single components and sets of positions alone."""
    manifest = session.bundle.manifest
    schedule = manifest.scheduled(policies)
    counts = iter(kept_tokens(manifest.keep, schedule, layers=4, visual_tokens=prompt.visual_index.shape[0]))
    prefill = session.prefill(prompt, policies=policies)
    state = {"hidden": prefill.inputs_embeds, "position_ids": prompt.position_ids}
    arrived, visual, kept = np.arange(prompt.input_ids.shape[1]), set(prompt.visual_index.tolist()), []
    empty = np.zeros((1, 2, 0, 16), dtype=np.float32)
    for stage in manifest.stages(schedule):
        if stage.role is Role.DECODER:
            feeds = {spec.name: empty for spec in stage.inputs if spec.name.startswith("past")}
            feeds |= {"inputs_embeds": state["hidden"], "position_ids": state["position_ids"]}
            outputs = session.run(stage.name, feeds)
            state |= outputs | {"hidden": outputs.get("hidden_states")}
            continue
        places = np.flatnonzero([position in visual for position in arrived.tolist()])
        state |= {"visual_index": places, "keep_slots": np.zeros(next(counts), dtype=np.int64)}
        state["states"] = state.get("query_states")
        outputs = session.run(stage.name, {spec.name: state[spec.name] for spec in stage.inputs})
        state |= {"hidden": outputs["kept_hidden"], "position_ids": outputs["kept_position_ids"]}
        arrived = arrived[outputs["kept_index"]]
        visual &= set(arrived.tolist())
        kept.append(tuple(arrived.tolist()))
    return kept


@pytest.mark.parametrize(
    "policies",
    [(), ("divprune",), ("random-3", "paper-highest"), ("norm-lowest-hidden", "nothing")],
    ids=["own", "one for both", "one each", "the last keeps nothing"],
)
@pytest.mark.parametrize("pictures", [1, 2])
def test_positions_at_a_later_cut_are_those_of_the_prompt(cutter, policies, pictures):
    shown = [tiny_picture(200, 130), tiny_picture(84, 112, seed=1)][:pictures]
    prompt = cutter.prompts.build(shown, QUESTION)
    answer = cutter.generate(shown, QUESTION, max_new_tokens=2, policies=policies)
    assert [cut.kept_index for cut in answer.cuts] == by_hand(cutter, prompt, policies)
    assert answer.kept_index == answer.cuts[-1].kept_index
    assert [cut.layer for cut in answer.cuts] == [1, 3]
    text = np.setdiff1d(np.arange(answer.prompt_tokens), prompt.visual_index)
    assert all(set(text.tolist()) <= set(cut.kept_index) for cut in answer.cuts)
    assert set(answer.cuts[1].kept_index) < set(answer.cuts[0].kept_index)


def test_every_span_has_caches_as_long_as_what_reached_it(cutter):
    prompt = cutter.prompts.build([tiny_picture(200, 130)], QUESTION)
    prefill = cutter.prefill(prompt)
    first, second = (len(cut.kept_index) for cut in prefill.cuts)
    answer = cutter.continuation(prefill)
    answer.feed(int(prefill.logits.argmax()))
    for layer, reached in enumerate((prompt.input_ids.shape[1], first, first, second)):
        for part in ("key", "value"):
            assert prefill.caches[f"past_key_values.{layer}.{part}"].shape == (1, 2, reached, 16)


def test_spans_alone_are_the_model_that_keeps_everything(cutter):
    shown = [tiny_picture(200, 130)]
    unpruned = cutter.generate(shown, QUESTION, max_new_tokens=6, prune=False)
    everything = cutter.generate(shown, QUESTION, max_new_tokens=6, keep=Keep(ratio=1.0))
    assert unpruned.token_ids == everything.token_ids
    assert unpruned.kept_index == tuple(range(unpruned.prompt_tokens))
    assert (unpruned.cuts, unpruned.policies, unpruned.keep) == ((), (), Keep(ratio=1.0))
    assert unpruned.pictures[0].kept.all()


def test_what_was_kept_of_a_picture_is_told_cut_by_cut(cutter):
    shown = [tiny_picture(120, 60, seed=1), tiny_picture(60, 150, seed=2)]
    answer = cutter.generate(shown, QUESTION, max_new_tokens=1)
    prompt = cutter.prompts.build(shown, QUESTION)
    for number, cut in enumerate(answer.cuts):
        mask = np.concatenate([picture.masks[number] for picture in answer.pictures])
        assert np.array_equal(prompt.visual_index[mask], np.intersect1d(prompt.visual_index, cut.kept_index))
    assert all(picture.kept_tokens == picture.kept_by_cut[-1] for picture in answer.pictures)


class Counting:
    """Opens components in ONNX Runtime and remembers what ran."""

    def __init__(self):
        self.opened, self.ran = [], []

    def __call__(self, file):
        self.opened.append(file.stem)
        runner = OnnxRuntimeRunner(file)
        run = runner.run
        runner.run = lambda feeds, **options: (self.ran.append(file.stem), run(feeds, **options))[1]
        return runner


def test_what_prunes_is_opened_when_it_is_first_used_and_runs_once_a_prompt(twice):
    spans = ["decoder_0", "decoder_1", "decoder_2"]
    counting = Counting()
    with Session.open(twice, runner=counting) as session:
        assert counting.opened == ["vision_encoder", *spans]  # the embedding table is no session
        session.generate([], QUESTION, max_new_tokens=2)
        assert counting.ran == spans * 2
        assert len(counting.opened) == 4
        counting.ran.clear()
        session.generate([tiny_picture(60, 60)], QUESTION, max_new_tokens=3, policies=("divprune", "nothing"))
        walked = ["decoder_0", "prune_0.divprune", "decoder_1", "prune_1.nothing", "decoder_2"]
        assert counting.ran == ["vision_encoder", *walked, *spans * 2]
        assert counting.opened[4:] == ["prune_0.divprune", "prune_1.nothing"]


def test_a_cut_before_the_first_layer_prunes_embeddings(tiny_checkpoint, tmp_path):
    bundle = export_tiny(
        tiny_checkpoint, tmp_path / "bundle", schedule=Schedule((Cut(0, MaxMin()),)), keep=0.5
    )
    with Session.open(bundle, threads=1) as session:
        prompt = session.prompts.build([tiny_picture(200, 130)], QUESTION)
        prefill = session.prefill(prompt)
    (cut,) = prefill.cuts
    assert len(np.intersect1d(cut.kept_index, prompt.visual_index)) == 17
    kept = prefill.inputs_embeds[:, cut.kept_index]
    assert np.array_equal(cut.hidden_states.numpy(), kept)
    assert {value.shape[2] for value in prefill.caches.values()} == {len(cut.kept_index)}


def test_a_lone_cut_that_keeps_nothing_needs_no_keep(tiny_checkpoint, tmp_path):
    bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", layer=2, policies=(Nothing(),))
    with Session.open(bundle, threads=1) as session:
        answer = session.generate([tiny_picture(90, 60)], QUESTION, max_new_tokens=2, policies=("nothing",))
        assert len(answer.kept_index) == answer.prompt_tokens - answer.visual_tokens
        assert answer.keep == Keep(ratio=0.5)
        with pytest.raises(UsageError, match="above the largest possible"):
            session.generate(
                [tiny_picture(90, 60)],
                QUESTION,
                max_new_tokens=2,
                keep=Keep(ratio=0.75),
                policies=("nothing",),
            )


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        (("norm-highest",), "no policy 'norm-highest' at cut 0"),
        (("divprune",) * 3, "3 policies for 2 cuts"),
        (("nothing", "divprune"), "no visual token left to choose from"),
    ],
)
def test_policies_that_cannot_be_are_refused(cutter, policies, said):
    with pytest.raises(UserError, match=said):
        cutter.generate([tiny_picture(60, 60)], QUESTION, max_new_tokens=1, policies=policies)


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
    (copy / "decoder_1.onnx").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"cannot load decoder_1\.onnx"):
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
            if file.name == "decoder_1.onnx":
                raise UserError("no")
            self.name = file.stem

        def run(self, feeds, *, on_device=()):
            raise AssertionError(feeds, on_device)

        def close(self):
            closed.append(self.name)

    with pytest.raises(UserError, match="no"):
        Session.open(tiny_bundle, runner=Fake)
    assert set(closed) == {"vision_encoder", "decoder_0"}


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
    (kept,) = kept_tokens(Keep(tokens=20), tiny_bundle.manifest.schedule, layers=4, visual_tokens=35)
    assert len(made.pictures[0].kept_tokens) == kept


@pytest.fixture
def own_keep(session):
    """A keep of every prompt's own, fitted to three sizes of one picture's scores."""
    schedule = session.bundle.manifest.schedule
    prompt = session.prompts.build([tiny_picture(200, 130)], QUESTION)
    scores = session.prefill(prompt, Keep(ratio=1.0)).cuts[0].scores
    spread = [scores + distance * scores.std() for distance in (-1.0, 0.0, 0.5)]
    return fit_threshold(0.75, schedule, spread, layers=4)


def test_a_manifests_adaptive_keep_is_followed_and_can_be_overridden(copy, tiny_bundle, own_keep):
    write_manifest(copy, dataclasses.replace(tiny_bundle.manifest, keep=own_keep))
    opened = Bundle.open(copy, verify=False)
    assert opened.manifest.keep == own_keep
    with Session.open(opened, threads=1) as session:
        prompt = session.prompts.build([tiny_picture(200, 130)], QUESTION)
        own, cut = session.prefill(prompt), session.prefill(prompt).cuts[0]
        good = np.flatnonzero(cut.scores >= own_keep.threshold.value)
        assert np.array_equal(np.intersect1d(cut.kept_index, prompt.visual_index), prompt.visual_index[good])
        fixed = session.prefill(prompt, Keep(ratio=0.75))
        assert len(fixed.kept_index) != len(own.kept_index)
        asked = session.prefill(prompt, Keep(ratio=0.75, adaptive=True))  # what the bundle has, by its name
        assert np.array_equal(asked.kept_index, own.kept_index)
        answer = session.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=1)
        assert answer.keep == own_keep
        assert len(answer.kept_index) == len(own.kept_index)


def test_an_adaptive_keep_scores_first_and_keeps_then(tiny_bundle, own_keep):
    counting = Counting()
    with Session.open(tiny_bundle, runner=counting) as session:
        session.generate([tiny_picture(200, 130)], QUESTION, max_new_tokens=1, keep=own_keep)
    prune = "prune_0.paper-highest"
    assert counting.ran == ["vision_encoder", "decoder_0", prune, prune, "decoder_1"]


def test_an_adaptive_keep_that_the_bundle_has_not_is_refused(session):
    prompt = session.prompts.build([tiny_picture(60, 60)], QUESTION)
    with pytest.raises(UsageError, match="has no threshold") as caught:
        session.prefill(prompt, Keep(ratio=0.75, adaptive=True))
    assert "--calibration" in caught.value.hint

"""One question on the trained model, against Hugging Face's own generate, attention and forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digit_scenes import READING, make_scene, questions
from measuring import bench_of, question_about, two_cuts
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.measure.ask import full_pass, measure
from ep_export.measure.bench import build_prompt
from ep_export.measure.choosing import AtCut, Prompted, kept_by
from ep_export.measure.pruned import arrivals, gap, pruned_log_probs
from ep_export.measure.question import normalise
from ep_export.measure.spelling import says
from ep_export.measure.view import instruction_positions
from ep_export.measure.ways import one_cut
from ep_export.methods import METHODS, Place, method_named
from ep_export.policy import Keep
from ep_export.reference import PruneSpec, greedy, load_model, prune
from ep_export.sweep.gallery import pruned_answer

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
QUARTER, HALF = Keep(ratio=0.25), Keep(ratio=0.5)
BEFORE = [one_cut(0, method.key, QUARTER) for method in METHODS if method.place is Place.ANYWHERE]
CHOOSING = [method for method in METHODS if method.place in {Place.INSIDE, Place.ANYWHERE}]
INSIDE = [one_cut(layer, each.key, keep) for layer, keep in ((1, QUARTER), (3, HALF)) for each in CHOOSING]
TWO = [
    two_cuts((1, 0.3, "norm-lowest"), (4, 0.2, "random"), 0.3),
    two_cuts((1, 0.3, "fastv"), (3, 0.2, "dart"), 0.3),
    two_cuts((0, 0.5, "cdpruner"), (2, 0.2, "fastv"), 0.3),
]


@pytest.fixture(scope="module")
def bench():
    checkpoint = open_checkpoint(str(READER))
    return bench_of(checkpoint, load_model(checkpoint), [*BEFORE, *INSIDE, *TWO])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list:
    """Three questions about small pictures, and a wrong answer, so that the model is wrong once."""
    folder = tmp_path_factory.mktemp("scenes")
    about = []
    for index in range(3):
        scene = make_scene("test", index=index, seed=5, size=(224, 224))
        scene.picture.save(folder / f"{index}.png")
        question = next(q for q in questions(scene) if q.kind == READING[index])
        about.append(question_about(folder / f"{index}.png", question.text, (question.answer,)))
    return [*about, replace(about[0], answers=("9 9",))]


def prompted_by(bench, question, answer=(0,)) -> Prompted:
    prompt = build_prompt(bench, question)
    return Prompted(question, prompt, full_pass(bench, prompt, list(answer)))


def forced(bench, prompted, way, kept) -> list[int]:
    """What Hugging Face generates when only these tokens are kept; one cut only."""
    ((_, positions),) = kept
    checkpoint = bench.checkpoint
    with prune(bench.model, PruneSpec(way.schedule, way.keep), select=lambda *_: torch.tensor(positions)):
        return greedy(bench.model, checkpoint.family, checkpoint.config, prompted.prompt, 8)


def test_one_forced_pass_says_what_generate_says(bench, scenes) -> None:
    """For every method and draw: counted right exactly when Hugging Face generates the right answer."""
    outcomes = []
    for question in (scenes[0], scenes[3]):
        result = measure(bench, question, entropies=False)
        prompted = prompted_by(bench, question)
        kept = kept_by(bench, prompted, bench.setting.ways)
        for way in [*BEFORE, *INSIDE]:
            right = {normalise(answer) for answer in question.answers}
            marks = "".join(
                "01"[normalise(bench.builder.decode(forced(bench, prompted, way, sets))) in right]
                for sets in kept[way.key]
            )
            assert result.ways[way.key].right == marks, way.key
            outcomes += marks
    assert {"0", "1"} == set(outcomes)  # it was a test of both


@pytest.mark.parametrize("way", TWO, ids=lambda way: way.key)
def test_two_cuts_say_what_generate_says(bench, scenes, way) -> None:
    """The gallery's answer, Hugging Face's generate pruned twice, agrees with the forced pass."""
    marks = ""
    for question in scenes[:3]:
        result = measure(bench, question, entropies=False).ways[way.key]
        prompted = prompted_by(bench, question)
        for sets, mark in zip(kept_by(bench, prompted, [way])[way.key], result.right, strict=True):
            said = bench.builder.decode(pruned_answer(bench, prompted, way, sets))
            assert "01"[normalise(said) == normalise(question.answers[0])] == mark
            marks += mark
    assert marks


def test_the_unpruned_model_is_judged_by_its_own_words(bench, scenes) -> None:
    right, wrong = (measure(bench, question) for question in (scenes[1], scenes[3]))
    assert (right.full_right, right.full_answer) == (True, scenes[1].answers[0])
    assert wrong.full_right is False
    assert wrong.full_answer != "9 9"
    assert set("".join(way.right for way in wrong.ways.values())) == {"0"}
    assert len(right.query_entropy) == 12
    unlabelled = measure(bench, replace(scenes[1], answers=()), entropies=False)
    assert unlabelled.full_right is None
    assert unlabelled.query_entropy == ()
    assert unlabelled.answer_tokens == right.answer_tokens
    for key, way in unlabelled.ways.items():
        assert way.right == ""
        if "random" in key:
            continue  # draws depend on the question with its answers
        assert way.kl == pytest.approx(right.ways[key].kl, abs=1e-4)
        assert way.agreement == right.ways[key].agreement


def test_another_spelling_of_the_right_answer_counts(bench, scenes) -> None:
    both = measure(bench, replace(scenes[1], answers=("9 9", *scenes[1].answers)), entropies=False)
    alone = measure(bench, scenes[1], entropies=False)
    assert both.full_right
    assert both.ways.keys() == alone.ways.keys()
    fixed = [key for key in alone.ways if "random" not in key]  # draws depend on the question
    assert [both.ways[key].right for key in fixed] == [alone.ways[key].right for key in fixed]


def test_draws_are_the_same_again_and_differ_from_each_other(bench, scenes) -> None:
    way = one_cut(1, "random", QUARTER)
    first, second = kept_by(bench, prompted_by(bench, scenes[0]), [way])[way.key]
    assert first != second
    assert kept_by(bench, prompted_by(bench, scenes[0]), [way])[way.key] == [first, second]
    assert first not in kept_by(bench, prompted_by(bench, scenes[1]), [way])[way.key]


def test_gallery_answers_are_those_of_generate(bench, scenes) -> None:
    prompted = prompted_by(bench, scenes[0])
    for way in INSIDE[:6]:
        sets = kept_by(bench, prompted, [way])[way.key][0]
        assert pruned_answer(bench, prompted, way, sets) == forced(bench, prompted, way, sets), way.key


def test_a_view_shows_the_prompt_and_not_the_answer(bench, scenes) -> None:
    prompted = prompted_by(bench, scenes[0], answer=[20, 21, 22])
    prompt, full = prompted.prompt, prompted.full
    length = prompt.input_ids.shape[1]
    assert (full.prompt_length, full.length) == (length, length + 2)
    ((_, arrival),) = arrivals(bench.decoder, full, [()], 1)
    view = AtCut(bench, prompted, arrival).view
    assert len(view.embeds) == len(view.hidden) == len(view.inside.queries) == len(view.inside.keys) == length
    words = prompt.input_ids[0][view.instruction.numpy()]
    assert bench.builder.decode(words).replace(" ", "") == scenes[0].text.replace(" ", "").casefold()
    # not found word for word: everything after the picture
    everything = instruction_positions(prompt, [1, 2, 3])
    assert everything.tolist() == list(range(int(prompt.visual_index[-1]) + 1, length))


def test_a_view_at_a_second_cut_shows_what_is_left(bench, scenes) -> None:
    prompted = prompted_by(bench, scenes[0])
    prompt, full = prompted.prompt, prompted.full
    kept = tuple(full.visual_index[::3].tolist())
    ((_, before),) = arrivals(bench.decoder, full, [()], 3)
    ((_, arrival),) = arrivals(bench.decoder, full, [((1, kept),)], 3)
    view, whole = AtCut(bench, prompted, arrival).view, AtCut(bench, prompted, before).view
    assert arrival.positions[view.visual_index].tolist() == list(kept)
    texts = set(range(full.prompt_length)) - set(full.visual_index.tolist())
    assert set(arrival.positions.tolist()) == texts | set(kept)
    question_ids = prompt.input_ids[0][whole.instruction.numpy()]
    left_ids = prompt.input_ids[0][arrival.positions[view.instruction].numpy()]
    assert left_ids.tolist() == question_ids.tolist()
    torch.testing.assert_close(view.embeds, whole.embeds[arrival.positions])


@pytest.mark.parametrize("after_a_cut", [False, True])
def test_attention_is_hugging_faces(tmp_path, after_a_cut) -> None:
    """Rotary embedding, grouped heads, scale and softmax, against attention that returns its weights."""
    checkpoint = open_checkpoint(str(make_tiny(tmp_path / "tiny", layers=3, heads=6, kv_heads=2)))
    model = load_model(checkpoint, torch.float64)
    bench = bench_of(checkpoint, model, [one_cut(layer, "fastv", Keep(ratio=0.8)) for layer in (1, 2)])
    tiny_picture(140, 112, seed=3).save(tmp_path / "picture.png")
    prompted = prompted_by(bench, question_about(tmp_path / "picture.png", "What is in the picture?"))
    visual = prompted.full.visual_index
    kept = visual[::2]
    weights = []

    def keep_weights(_module, _args, output) -> None:
        weights.append(output[1])

    hooks = [layer.self_attn.register_forward_hook(keep_weights) for layer in bench.decoder.layers]
    model.set_attn_implementation("eager")
    inputs = checkpoint.family.reference_inputs(prompted.prompt, checkpoint.config)
    with torch.inference_mode():
        if after_a_cut:
            way = one_cut(1, "random", Keep(tokens=len(kept) * 2 // 3 + len(visual) // 3))
            k = way.kept(layers=3, visual_tokens=len(visual))[0]
            kept = visual[:k]
            with prune(model, PruneSpec(way.schedule, way.keep), select=lambda *_: kept):
                model(**inputs)
        else:
            model(**inputs)
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    begun = [((1, tuple(kept.tolist())),)] if after_a_cut else [()]
    for layer in (2,) if after_a_cut else (1, 2):
        ((_, arrival),) = arrivals(bench.decoder, prompted.full, begun, layer)
        view = AtCut(bench, prompted, arrival).view
        last = len(view.hidden) - 1
        expected = weights[layer - 1][0].mean(dim=0)[last]
        attention = view.inside.attention_from(last)
        torch.testing.assert_close(attention, expected, atol=1e-5, rtol=1e-4, check_dtype=False)


def test_pruning_before_the_decoder_is_a_shorter_prompt(bench, scenes) -> None:
    """K = 0 against Hugging Face's language model on the embeddings that stay, at their positions."""
    prompted = prompted_by(bench, scenes[0])
    prompt, full = prompted.prompt, prompted.full
    ((_, arrival),) = arrivals(bench.decoder, full, [()], 0)
    at_cut = AtCut(bench, prompted, arrival)
    kept = at_cut.choose(method_named("divprune"), 16)
    ((_, log_probs),) = pruned_log_probs(bench.decoder, full, [((0, tuple(kept.tolist())),)])
    stays = np.setdiff1d(np.arange(full.prompt_length), np.setdiff1d(prompt.visual_index, kept.numpy()))
    with torch.inference_mode():
        hidden = bench.model.model.language_model(
            inputs_embeds=at_cut.view.embeds[None, stays],
            position_ids=torch.from_numpy(prompt.position_ids[:, :, stays]),
            use_cache=False,
        ).last_hidden_state
        expected = bench.model.lm_head(hidden[:, -1:]).float().log_softmax(-1)[0]
    assert gap(expected, log_probs).kl == pytest.approx(0, abs=1e-4)


def test_an_answer_the_tokenizer_cannot_write_is_refused(bench, scenes) -> None:
    with pytest.raises(UserError, match="cannot write the answer"):
        measure(bench, replace(scenes[0], answers=("a zebra",)))


def test_an_answer_is_said_only_when_it_also_ends(bench) -> None:
    end = bench.speller.end
    ids = [4, 5, end[0]]

    def predictions(*top):
        return torch.nn.functional.one_hot(torch.tensor(top), 304).float().log_softmax(-1)

    assert says(predictions(4, 5, end[0]), ids, end)
    assert says(predictions(4, 5, end[-1]), ids, end)  # any end token ends it
    assert not says(predictions(4, 5, 6), ids, end)
    assert not says(predictions(4, 6, end[0]), ids, end)
    assert not says(predictions(end[0], 5, end[0]), ids, end)

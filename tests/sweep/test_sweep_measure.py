"""One question on the trained model, against Hugging Face's own generate, attention and forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digit_scenes import READING, make_scene, questions
from tiny import make_tiny, tiny_picture

from ep_export.calibrate.fidelity import gap, pruned_log_probs, run_full
from ep_export.calibrate.pictures import PictureFile
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.methods import METHODS, find_methods
from ep_export.policy import Keep, Policy
from ep_export.reference import PruneSpec, greedy, load_model, prune
from ep_export.sweep.dataset import Item, normalise
from ep_export.sweep.gallery import Answerer
from ep_export.sweep.measure import Bench, build_prompt, choose_kept, measure
from ep_export.sweep.spelling import Speller, says
from ep_export.sweep.view import instruction_positions, token_view
from ep_export.sweep.ways import Spot, ways_at

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
SPOTS = (Spot(0, 0.25), Spot(1, 0.25), Spot(2, 0.25), Spot(3, 0.5))


def make_bench(checkpoint, model, spots, methods=METHODS) -> Bench:
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    return Bench(
        model=model,
        checkpoint=checkpoint,
        builder=builder,
        speller=Speller(checkpoint.path, builder.eos_token_ids),
        spots=spots,
        ways={spot: ways_at(spot, methods, {}) for spot in spots},
        seeds=2,
        seed=0,
        max_new_tokens=8,
    )


@pytest.fixture(scope="module")
def bench() -> Bench:
    checkpoint = open_checkpoint(str(READER))
    return make_bench(checkpoint, load_model(checkpoint), SPOTS)


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> list[Item]:
    """Three questions about small pictures, and a wrong answer, so that the model is wrong once."""
    folder = tmp_path_factory.mktemp("scenes")
    found = []
    for index in range(3):
        scene = make_scene("test", index=index, seed=5, size=(224, 224))
        scene.picture.save(folder / f"{index}.png")
        asked = next(q for q in questions(scene) if q.kind == READING[index])
        picture = PictureFile(f"{index}.png", folder / f"{index}.png")
        found.append(Item(picture, picture.sha256(), asked.text, (asked.answer,)))
    return [*found, replace(found[0], answers=("9 9",))]


def at_door(bench, item, spot, answer=()):
    """A full pass, and the view of the prompt at a spot."""
    prompt = build_prompt(bench, item)
    checkpoint = bench.checkpoint
    full = run_full(
        bench.model,
        checkpoint.family,
        prompt,
        answer or [0],
        layers=bench.doors,
        heads=checkpoint.dims.heads,
        entropies=False,
        projections=True,
    )
    view = token_view(
        checkpoint.family.decoder(bench.model),
        checkpoint.dims,
        full,
        spot.layer,
        prompt=prompt,
        instruction=instruction_positions(prompt, bench.speller.words(item.question)),
        rng=np.random.default_rng(0),
    )
    return prompt, full, view


def test_one_forced_pass_says_what_generate_says(bench, items) -> None:
    """For every method and draw: counted right exactly when Hugging Face generates the right answer."""
    checkpoint = bench.checkpoint
    outcomes = []
    for item in (items[0], items[3]):
        result = measure(bench, item, entropies=False)
        for spot in SPOTS[1:]:
            prompt, _, view = at_door(bench, item, spot)
            for way in bench.ways[spot]:
                marks = ""
                for kept in choose_kept(bench, item, way, view):
                    spec = PruneSpec(Policy(spot.layer), Keep(ratio=spot.keep))
                    with prune(bench.model, spec, select=lambda *_, kept=kept: kept):
                        said = greedy(bench.model, checkpoint.family, checkpoint.config, prompt, 8)
                    marks += "01"[normalise(bench.builder.decode(said)) == normalise(item.answers[0])]
                assert result.ways[way.key].right == marks, way.key
                outcomes += marks
    assert {"0", "1"} == set(outcomes)  # it was a test of both


def test_the_unpruned_model_is_judged_by_its_own_words(bench, items) -> None:
    right, wrong = (measure(bench, item) for item in (items[1], items[3]))
    assert (right.full_right, right.full_answer) == (True, items[1].answers[0])
    assert wrong.full_right is False
    assert wrong.full_answer != "9 9"
    assert set("".join(way.right for way in wrong.ways.values())) == {"0"}
    assert len(right.query_entropy) == 12
    unlabelled = measure(bench, replace(items[1], answers=()), entropies=False)
    assert unlabelled.full_right is None
    assert unlabelled.query_entropy == ()
    for key, way in unlabelled.ways.items():
        assert way.right == ""
        if key.startswith("random"):
            continue  # draws depend on the question with its answers
        assert way.kl == pytest.approx(right.ways[key].kl, abs=1e-4)
        assert way.agreement == right.ways[key].agreement


def test_another_spelling_of_the_right_answer_counts(bench, items) -> None:
    both = measure(bench, replace(items[1], answers=("9 9", *items[1].answers)), entropies=False)
    alone = measure(bench, items[1], entropies=False)
    assert both.full_right
    assert {k: w.agreement for k, w in both.ways.items()}.keys() == alone.ways.keys()
    deterministic = [key for key in alone.ways if not key.startswith("random")]  # draws depend on the item
    assert [both.ways[key].right for key in deterministic] == [alone.ways[key].right for key in deterministic]


def test_draws_are_the_same_again_and_differ_from_each_other(bench, items) -> None:
    _, _, view = at_door(bench, items[0], SPOTS[1])
    way = next(way for way in bench.ways[SPOTS[1]] if way.method.chance)
    first, second = choose_kept(bench, items[0], way, view)
    assert not first.equal(second)
    again = choose_kept(bench, items[0], way, view)
    assert first.equal(again[0])
    assert second.equal(again[1])
    other = choose_kept(bench, items[1], way, view)
    assert not first.equal(other[0])


def test_gallery_answers_are_those_of_generate(bench, items) -> None:
    checkpoint, spot = bench.checkpoint, SPOTS[2]
    prompt, _, view = at_door(bench, items[0], spot)
    answerer = Answerer(bench, prompt)
    for way in bench.ways[spot]:
        kept = choose_kept(bench, items[0], way, view)[0]
        spec = PruneSpec(Policy(spot.layer), Keep(ratio=spot.keep))
        with prune(bench.model, spec, select=lambda *_, kept=kept: kept):
            said = greedy(bench.model, checkpoint.family, checkpoint.config, prompt, 8)
        assert answerer.answer(spot.layer, kept) == said, way.key


def test_a_view_shows_the_prompt_and_not_the_answer(bench, items) -> None:
    prompt, full, view = at_door(bench, items[0], SPOTS[2], answer=[20, 21, 22])
    length = prompt.input_ids.shape[1]
    assert full.positions == length + 2
    assert len(view.embeds) == len(view.hidden) == len(view.inside.queries) == len(view.inside.keys) == length
    words = prompt.input_ids[0][view.instruction.numpy()]
    assert bench.builder.decode(words).replace(" ", "") == items[0].question.replace(" ", "").casefold()
    # not found word for word: everything after the picture
    everything = instruction_positions(prompt, [1, 2, 3])
    assert everything.tolist() == list(range(int(prompt.visual_index[-1]) + 1, length))


def test_attention_is_hugging_faces(tmp_path) -> None:
    """Rotary embedding, grouped heads, scale and softmax, against attention that returns its weights."""
    path = make_tiny(tmp_path / "tiny", layers=3, heads=6, kv_heads=2)
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, torch.float64)
    bench = make_bench(checkpoint, model, (Spot(1, 0.8), Spot(2, 0.8)), find_methods(("fastv",)))
    picture = tmp_path / "picture.png"
    tiny_picture(140, 112, seed=3).save(picture)
    item = Item(PictureFile("picture.png", picture), "0", "What is in the picture?", ())
    prompt = build_prompt(bench, item)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        inputs = checkpoint.family.reference_inputs(prompt, checkpoint.config)
        weights = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for spot in bench.spots:
        _, _, view = at_door(bench, item, spot)
        last = len(view.hidden) - 1
        expected = weights[spot.layer - 1][0].mean(dim=0)[last]
        torch.testing.assert_close(
            view.inside.attention_from(last), expected, atol=1e-5, rtol=1e-4, check_dtype=False
        )


def test_pruning_before_the_decoder_is_a_shorter_prompt(bench, items) -> None:
    """K = 0 against Hugging Face's language model on the embeddings that stay, at their positions."""
    item, spot = items[0], SPOTS[0]
    prompt, full, view = at_door(bench, item, spot)
    decoder = bench.checkpoint.family.decoder(bench.model)
    kept = find_methods(("divprune",))[0].choose(view, 16)
    (found,) = pruned_log_probs(decoder, full, 0, [kept])
    stays = np.setdiff1d(np.arange(len(view.embeds)), np.setdiff1d(prompt.visual_index, kept.numpy()))
    with torch.inference_mode():
        hidden = bench.model.model.language_model(
            inputs_embeds=view.embeds[None, stays],
            position_ids=torch.from_numpy(prompt.position_ids[:, :, stays]),
            use_cache=False,
        ).last_hidden_state
        expected = bench.model.lm_head(hidden[:, -1:]).float().log_softmax(-1)[0]
    assert gap(expected, found).kl == pytest.approx(0, abs=1e-4)


def test_an_answer_the_tokenizer_cannot_write_is_refused(bench, items) -> None:
    with pytest.raises(UserError, match="cannot write the answer"):
        measure(bench, replace(items[0], answers=("a zebra",)))


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

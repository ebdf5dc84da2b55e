"""Pictures scaled down, and keeps of every picture's own, on the trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from digit_scenes import READING, make_scene, questions
from measuring import bench_of, question_about

from ep_export.adaptive import own_tokens
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.families.picture_sizes import scaled_picture
from ep_export.first_token import first_token_flops
from ep_export.measure.ask import measure
from ep_export.measure.bench import build_prompt
from ep_export.measure.question import normalise
from ep_export.measure.scaled import scaled_prompt
from ep_export.measure.thresholds import measured_threshold
from ep_export.measure.ways import Scaling, Way, one_cut, scheduled_way
from ep_export.policy import Cut, Keep, MaxMin, Schedule, Scorer, Select, TopK
from ep_export.reference import PruneSpec, greedy, load_model, prune
from ep_export.runtime.pictures import open_picture

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
HALF = Keep(ratio=0.5)
TOKENS, FLOPS = (Way((), HALF, scaling) for scaling in Scaling)


@pytest.fixture(scope="module")
def bench():
    checkpoint = open_checkpoint(str(READER))
    return bench_of(checkpoint, load_model(checkpoint), [TOKENS, FLOPS, one_cut(2, "divprune", HALF)])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("scenes")
    about = []
    for index, size in enumerate([(224, 224), (300, 160), (200, 300)]):
        scene = make_scene("test", index=index, seed=5, size=size)
        scene.picture.save(folder / f"{index}.png")
        question = next(q for q in questions(scene) if q.kind == READING[index])
        about.append(question_about(folder / f"{index}.png", question.text, (question.answer,)))
    return about


def test_the_smaller_picture_is_the_largest_that_the_budget_allows(bench, scenes) -> None:
    for question in scenes:
        prompt = build_prompt(bench, question)
        visual = len(prompt.visual_index)
        same_tokens, same_flops = (scaled_prompt(bench, question, prompt, way) for way in (TOKENS, FLOPS))
        assert 0.3 * visual < len(same_tokens.visual_index) <= 0.5 * visual
        # the encoder of a smaller picture costs less, so as many FLOPs pay for more tokens
        assert len(same_tokens.visual_index) < len(same_flops.visual_index) < visual
        budget = first_token_flops(bench.checkpoint, prompt, Schedule((Cut(0, MaxMin()),)), HALF)
        assert 0.7 * budget < first_token_flops(bench.checkpoint, same_flops) <= budget


def test_it_is_judged_as_generate_answers_about_it(bench, scenes) -> None:
    """Hugging Face, asked about the smaller picture itself."""
    for question in scenes:
        result = measure(bench, question, entropies=False)
        for way in (TOKENS, FLOPS):
            smaller = scaled_prompt(bench, question, build_prompt(bench, question), way)
            checkpoint = bench.checkpoint
            said = greedy(bench.model, checkpoint.family, checkpoint.config, smaller, 8)
            outcome = result.ways[way.key]
            right = normalise(bench.builder.decode(said)) == normalise(question.answers[0])
            assert outcome.right == "01"[right]
            assert outcome.kept == (len(smaller.visual_index),)
            assert 0 < outcome.vision_flops < result.vision_flops
        pruned = result.ways["2:divprune@0.5"]
        assert pruned.vision_flops is None
        assert pruned.kept == one_cut(2, "divprune", HALF).kept(layers=12, visual_tokens=result.visual_tokens)


def test_a_picture_that_cannot_be_small_enough_is_left_out(bench, scenes) -> None:
    """The processor enlarges pictures of fewer than 16 tokens."""
    tiny = Way((), Keep(ratio=0.02), Scaling.TOKENS)
    few = replace(bench, setting=replace(bench.setting, ways=(tiny,)))
    assert scaled_prompt(few, scenes[0], build_prompt(few, scenes[0]), tiny) is None
    assert measure(few, scenes[0], entropies=False).ways == {}


def test_pictures_are_scaled_down_before_anything_is_asked(bench, scenes) -> None:
    small = replace(bench, setting=replace(bench.setting, max_pixels=20000))
    picture = scaled_picture(open_picture(scenes[0].picture.path), 20000)
    prompt = build_prompt(small, scenes[0])
    assert np.array_equal(
        prompt.pictures[0].pixel_values,
        bench.builder.build([picture], scenes[0].text).pictures[0].pixel_values,
    )
    assert len(prompt.visual_index) < len(build_prompt(bench, scenes[0]).visual_index)


@pytest.mark.parametrize("chooser", [TopK(Scorer.NORM, Select.LOWEST), MaxMin()], ids=lambda c: c.name)
def test_a_threshold_gives_every_picture_what_the_oracle_keeps(bench, scenes, chooser) -> None:
    schedule = Schedule((Cut(2, chooser),))
    keep = measured_threshold(bench, scenes, schedule, 0.5)
    way = scheduled_way(schedule, keep, layers=12)
    asking = replace(
        bench,
        setting=replace(bench.setting, ways=(way,)),
        methods={**bench.methods, chooser.name: bench.methods.get(chooser.name) or _method(chooser.name)},
    )
    shares, counts = [], []
    for question in scenes:
        result = measure(asking, question, entropies=False)
        (kept,), visual = result.ways[way.key].kept, result.visual_tokens
        prompt = build_prompt(bench, question)
        inputs = bench.checkpoint.family.reference_inputs(prompt, bench.checkpoint.config)
        with prune(bench.model, PruneSpec(schedule, keep)) as trace:
            bench.model(**inputs)
        (cut,) = trace.cuts
        assert len(cut.kept_visual) == kept
        assert kept == own_tokens(keep, cut.scores.numpy(), schedule, layers=12, visual_tokens=visual)
        shares.append((2 + 10 * kept / visual) / 12)
        counts.append(kept)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    assert len(set(counts)) > 1


def test_scores_of_no_picture_fit_no_threshold(bench) -> None:
    with pytest.raises(UserError, match="needs pictures to be fitted to"):
        measured_threshold(bench, [], Schedule((Cut(2, MaxMin()),)), 0.5)


def _method(name):
    from ep_export.methods import method_named

    return method_named(name)

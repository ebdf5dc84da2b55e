"""The engine against the oracle: Hugging Face's own forward and generate inside `reference.prune`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from measuring import bench_of, question_about, two_cuts
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import open_checkpoint
from ep_export.entropy import METRICS, LayerTokens, layer_entropy
from ep_export.measure import pruned as pruned_module
from ep_export.measure.ask import full_pass, measure
from ep_export.measure.bench import build_prompt
from ep_export.measure.choosing import Prompted, kept_by
from ep_export.measure.full_pass import run_full
from ep_export.measure.pruned import gap, pruned_log_probs
from ep_export.measure.ways import one_cut
from ep_export.policy import Keep, Nothing, Source
from ep_export.reference import PruneSpec, greedy, kept_as, load_model, prune

LAYERS = 5
ATTENTION = "norm-highest-attention"
ONE_CUT = [
    one_cut(layer, method, Keep(ratio=0.8))
    for layer, methods in {
        0: ("divprune", "norm-highest-hidden"),
        1: ("paper-highest", "norm-lowest", "divprune", "released-lowest-key"),
        3: ("order2-highest", "norm-highest-value", ATTENTION),
    }.items()
    for method in methods
]
TWO_CUTS = [
    two_cuts((1, 0.7, "divprune"), (3, 0.3, "paper-highest"), 0.55),
    two_cuts((1, 0.7, "norm-lowest"), (3, 0.3, "divprune"), 0.55),
    two_cuts((0, 0.7, "divprune"), (2, 0.4, "norm-highest"), 0.5),
    two_cuts((2, 0.5, "paper-lowest"), (4, 0, "nothing"), 0.6),
    two_cuts((1, 0.5, "paper-highest"), (2, 0.25, "released-highest-key"), 0.4),
    two_cuts((1, 0.5, ATTENTION), (3, 0.25, f"coverage-{ATTENTION}"), 0.5),
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("measure")
    checkpoint = open_checkpoint(str(make_tiny(folder / "tiny", layers=LAYERS, heads=6, kv_heads=2)))
    tiny_picture(140, 112, seed=3).save(folder / "picture.png")
    model = load_model(checkpoint, torch.float64)
    bench = bench_of(checkpoint, model, [*ONE_CUT, *TWO_CUTS], max_new_tokens=5)
    question = question_about(folder / "picture.png", "What is in the picture?")
    prompt = build_prompt(bench, question)
    answer = greedy(model, checkpoint.family, checkpoint.config, prompt, 5)
    assert checkpoint.config.image_token_id not in answer  # it could not be fed back
    return bench, question, prompt, answer


def oracle_log_probs(case, way=None) -> torch.Tensor:
    """Log-probabilities at the answer's positions from Hugging Face's forward over prompt and answer."""
    bench, _, prompt, answer = case
    fed = np.concatenate([prompt.input_ids, np.array([answer[:-1]], dtype=np.int64)], axis=1)
    inputs = bench.checkpoint.family.reference_inputs(replace(prompt, input_ids=fed), bench.checkpoint.config)
    with torch.inference_mode():
        if way is None:
            logits = bench.model(**inputs).logits
        else:
            spec = PruneSpec(way.schedule, way.keep)
            with prune(bench.model, spec) as trace:  # what is kept is chosen before there is an answer
                bench.model(**bench.checkpoint.family.reference_inputs(prompt, bench.checkpoint.config))
            kept = kept_as([cut.kept_index for cut in trace.cuts])
            with prune(bench.model, spec, select=kept):
                logits = bench.model(**inputs).logits
    return logits[0, -len(answer) :].double().log_softmax(-1)


@pytest.mark.parametrize("way", [*ONE_CUT, *TWO_CUTS], ids=lambda way: way.key)
def test_kl_and_agreement_are_the_oracles(case, way) -> None:
    bench, question, _, answer = case
    measured = measure(bench, question).ways[way.key]
    full, pruned = oracle_log_probs(case), oracle_log_probs(case, way)
    kl = torch.nn.functional.kl_div(pruned, full, log_target=True, reduction="sum") / len(answer)
    assert measured.kl == (pytest.approx(float(kl), abs=1e-4),)
    assert measured.agreement == ((full.argmax(-1) == pruned.argmax(-1)).double().mean().item(),)
    assert kl > 1e-3  # pruning did change something


@pytest.mark.parametrize("way", TWO_CUTS, ids=lambda way: way.key)
def test_the_second_cut_chooses_from_what_the_first_one_left(case, way) -> None:
    bench, question, prompt, answer = case
    kept = kept_by(bench, Prompted(question, prompt, full_pass(bench, prompt, answer)), [way])[way.key]
    inputs = bench.checkpoint.family.reference_inputs(prompt, bench.checkpoint.config)
    with prune(bench.model, PruneSpec(way.schedule, way.keep)) as trace, torch.inference_mode():
        bench.model(**inputs)
    expected = tuple(
        (cut.layer, tuple(seen.kept_visual.tolist())) for cut, seen in zip(way.cuts, trace.cuts, strict=True)
    )
    assert kept == [expected]
    assert set(expected[1][1]) < set(expected[0][1])


def test_the_full_pass_is_hugging_faces_forward(case) -> None:
    bench, _, prompt, answer = case
    full = full_pass(bench, prompt, answer)
    torch.testing.assert_close(full.log_probs.double(), oracle_log_probs(case), atol=1e-5, rtol=0)


def test_keeping_all_costs_nothing(case) -> None:
    bench, _, prompt, answer = case
    full = full_pass(bench, prompt, answer)
    everything = tuple(full.visual_index.tolist())
    for sets in (((2, everything),), ((1, everything), (3, everything))):
        ((_, log_probs),) = pruned_log_probs(bench.decoder, full, [sets])
        one = gap(full.log_probs, log_probs)
        assert one.kl == pytest.approx(0, abs=1e-5)
        assert one.agreements == len(answer)


def test_batches_do_not_change_the_predictions(case, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, _, prompt, answer = case
    full = full_pass(bench, prompt, answer)
    visual = full.visual_index.tolist()
    sets = [((1, tuple(visual[i : i + 6])), (3, tuple(visual[i : i + 3]))) for i in range(5)]
    sets += [((1, tuple(visual[i : i + 6])),) for i in range(5)]
    together = dict(pruned_log_probs(bench.decoder, full, sets))
    monkeypatch.setattr(pruned_module, "_BATCH_TOKENS", 1)
    alone = dict(pruned_log_probs(bench.decoder, full, sets))
    assert set(together) == set(alone) == set(sets)
    for one in sets:
        torch.testing.assert_close(together[one], alone[one], atol=1e-6, rtol=0)


def test_states_and_entropies_are_those_of_the_projections(case) -> None:
    bench, _, prompt, answer = case
    setting = replace(bench.setting, metrics=True)
    full = full_pass(replace(bench, setting=setting), prompt, answer, entropies=True)
    fed = np.concatenate([prompt.input_ids, np.array([answer[:-1]], dtype=np.int64)], axis=1)
    config = bench.checkpoint.config
    inputs = bench.checkpoint.family.reference_inputs(replace(prompt, input_ids=fed), config)
    with torch.inference_mode():
        hidden = bench.model(**inputs, output_hidden_states=True).hidden_states
        for index, layer in enumerate(bench.decoder.layers):
            normed = layer.input_layernorm(hidden[index])[0]
            queries, keys = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
            visual = full.visual_index
            assert full.curves.query_entropy[index] == pytest.approx(layer_entropy(queries[visual]), abs=1e-6)
            assert full.curves.key_entropy[index] == pytest.approx(layer_entropy(keys[visual]), abs=1e-6)
            text = np.setdiff1d(np.arange(full.prompt_length), visual.numpy())
            tokens = LayerTokens(queries[visual], hidden[index][0, visual], hidden[index][0, text])
            for metric in METRICS:
                computed = full.curves.metrics[metric.key][index]
                assert computed == pytest.approx(metric.compute(tokens), rel=1e-3), metric.key
            if index + 1 in bench.setting.layers:
                torch.testing.assert_close(full.projections[index + 1][Source.QUERY][0], queries)
                torch.testing.assert_close(full.hidden[index][0], hidden[index][0])


def test_only_wanted_layers_are_kept_in_memory(case) -> None:
    bench, _, prompt, answer = case
    full = run_full(bench.model, bench.checkpoint.family, prompt, answer, layers=[2])
    assert set(full.hidden) == {0, 2, LAYERS}
    assert full.curves is None


def test_ways_that_a_picture_is_too_small_for_are_left_out(case) -> None:
    bench, question, _, _ = case
    possible, impossible = one_cut(1, "random", Keep(tokens=9)), one_cut(4, "random", Keep(tokens=9))
    small = bench_of(bench.checkpoint, bench.model, [possible, impossible], max_new_tokens=2)
    assert set(measure(small, question).ways) == {possible.key}


def test_nothing_keeps_nothing(case) -> None:
    bench, question, prompt, answer = case
    way = one_cut(3, Nothing().name, Keep(ratio=3 / 5))
    bench = bench_of(bench.checkpoint, bench.model, [way])
    full = full_pass(bench, prompt, answer)
    assert kept_by(bench, Prompted(question, prompt, full), [way]) == {way.key: [((3, ()),)]}

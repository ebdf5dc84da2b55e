"""The pruned Hugging Face model against a decoder written by hand in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoder_by_hand import run_by_hand
from oracle_cases import case, whole_sequence

from ep_export.planning import average_keep, kept_tokens, span_tokens
from ep_export.policy import (
    Budget,
    Cut,
    Keep,
    MaxMin,
    Nothing,
    Schedule,
    Scorer,
    Select,
    Source,
    TopK,
)
from ep_export.reference import PruneSpec, prune

# The model computes in float32, the reference in float64: logits of size 10 through up to 9 layers.
TOLERANCE = 2e-4

ATTENTION = TopK(Scorer.NORM, source=Source.ATTENTION)


def one_cut(layer, **chooser):
    return Schedule((Cut(layer, TopK(**chooser)),))


def assert_follows_hand(oracle, schedule, keep=None, tokens=4):
    """Kept sets, scores, prefill logits and every decode step's logits agree; so do the caches' lengths."""
    layers = oracle.model.config.text_config.num_hidden_layers
    keep = keep or average_keep(schedule, layers=layers)
    n = len(oracle.prompt.visual_index)
    counts = kept_tokens(keep, schedule, layers=layers, visual_tokens=n)
    with prune(oracle.model, PruneSpec(schedule, keep)) as trace, torch.inference_mode():
        out = oracle.model.generate(
            **oracle.inputs,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    prompt_length = oracle.prompt.input_ids.shape[1]
    answer = out.sequences[0, prompt_length:].tolist()
    hand = run_by_hand(
        oracle.model,
        *whole_sequence(oracle, answer),
        oracle.prompt.visual_index,
        schedule,
        counts,
        prompt_length=prompt_length,
    )
    assert [len(cut.kept_visual) for cut in trace.cuts] == list(counts)
    for cut, kept, scores in zip(trace.cuts, hand.kept_index, hand.scores, strict=True):
        np.testing.assert_array_equal(cut.kept_index, kept[kept < prompt_length])
        if len(scores):
            np.testing.assert_allclose(cut.scores, scores, atol=1e-4)
    last = len(trace.kept_index) - 1
    got = torch.cat(out.logits).numpy()
    np.testing.assert_allclose(got, hand.logits[last : last + tokens], atol=TOLERANCE)
    text = prompt_length - n + tokens - 1  # the last token is never fed
    expected = [text + visual for span, visual in span_tokens(schedule, layers, n, counts) for _ in span]
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == expected


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "layers", "split"),
    [
        (6, 2, 16, 3, 1),
        (7, 1, 40, 5, 4),
        (16, 4, 16, 4, 2),
        (6, 2, 128, 3, 2),
        (7, 1, 16, 9, 8),
        (16, 4, 40, 3, 1),
    ],
)
def test_odd_shapes_match_decoder_by_hand(heads, kv_heads, head_dim, layers, split):
    oracle = case(heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=layers)
    least = split / layers
    assert_follows_hand(oracle, one_cut(split), Keep(ratio=least + 0.4 * (1 - least)))


@pytest.mark.parametrize("split", [1, 2, 3])
def test_every_split_matches_decoder_by_hand(split):
    assert_follows_hand(case(), one_cut(split), Keep(ratio=split / 4 + 0.1))


@pytest.mark.parametrize("scorer", Scorer)
@pytest.mark.parametrize("select", Select)
def test_every_scorer_and_direction_matches_decoder_by_hand(scorer, select):
    assert_follows_hand(case(heads=6), one_cut(2, scorer=scorer, select=select), Keep(ratio=0.7), tokens=2)


@pytest.mark.parametrize("source", Source)
def test_every_source_matches_decoder_by_hand(source):
    scorer = Scorer.NORM if source is Source.ATTENTION else Scorer.RELEASED
    schedule = one_cut(1, scorer=scorer, source=source)
    assert_follows_hand(case(heads=6), schedule, Keep(ratio=0.5), tokens=2)


@pytest.mark.parametrize("budget", Budget)
def test_two_pictures_match_decoder_by_hand(budget):
    oracle = case(sizes=((140, 112), (84, 168)))
    assert len(oracle.prompt.pictures) == 2
    assert_follows_hand(oracle, one_cut(1, budget=budget), Keep(ratio=0.4))


def test_one_kept_token_matches_decoder_by_hand():
    oracle = case()
    n = len(oracle.prompt.visual_index)
    keep = Keep(ratio=(n + 3 * 1.5) / (4 * n))  # (L r N - K N) / (L - K) = 1.5 for L = 4, K = 1
    assert kept_tokens(keep, one_cut(1), layers=4, visual_tokens=n) == (1,)
    assert_follows_hand(oracle, one_cut(1), keep)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule((Cut(1, TopK(), 0.6), Cut(3, TopK(select=Select.LOWEST), 0.3))),
        Schedule((Cut(1, MaxMin(), 0.5), Cut(2, TopK(Scorer.NORM, source=Source.KEY), 0.25))),
        Schedule((Cut(0, MaxMin(), 0.7), Cut(2, TopK(), 0.4))),
        Schedule((Cut(1, ATTENTION, 0.6), Cut(3, ATTENTION, 0.3))),
        Schedule((Cut(0, TopK(source=Source.HIDDEN), 0.7), Cut(1, MaxMin(), 0.5), Cut(3, Nothing(), 0.0))),
        Schedule((Cut(1, TopK(), 0.6), Cut(2, TopK(), 0.6))),
    ],
    ids=str,
)
def test_several_cuts_match_decoder_by_hand(schedule):
    assert_follows_hand(case(), schedule)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("chooser", [MaxMin(), TopK(source=Source.HIDDEN)], ids=str)
def test_one_cut_on_hidden_states_matches_decoder_by_hand(layer, chooser):
    assert_follows_hand(case(), Schedule((Cut(layer, chooser),)), Keep(ratio=0.75))


def test_two_cuts_of_two_pictures_match_decoder_by_hand():
    """Pictures are told apart by the text between them, also after tokens were dropped."""
    oracle = case(sizes=((140, 112), (84, 168)))
    share_alike = TopK(budget=Budget.PER_PICTURE)
    assert_follows_hand(oracle, Schedule((Cut(1, share_alike, 0.5), Cut(2, share_alike, 0.2))))

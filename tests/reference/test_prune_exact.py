"""The pruned Hugging Face model against a decoder written by hand in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoder_by_hand import run_by_hand
from oracle_cases import case, whole_sequence

from ep_export.plan import kept_tokens
from ep_export.policy import Budget, Keep, Policy, Scorer, Select, Source
from ep_export.reference import PruneSpec, prune

# The model computes in float32, the reference in float64: logits of size 10 through up to 9 layers.
TOLERANCE = 2e-4


def assert_follows_hand(made, policy, keep, tokens=4):
    """Kept set, scores, prefill logits and every decode step's logits agree."""
    layers = made.model.config.text_config.num_hidden_layers
    n = len(made.prompt.visual_index)
    k = kept_tokens(keep, layers=layers, layer=policy.layer, visual_tokens=n)
    with prune(made.model, PruneSpec(policy, keep)) as trace, torch.inference_mode():
        out = made.model.generate(
            **made.inputs,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    answer = out.sequences[0, made.prompt.input_ids.shape[1] :].tolist()
    hand = run_by_hand(made.model, *whole_sequence(made, answer), made.prompt.visual_index, policy, k)
    prompt_rows = hand.kept_index[: len(trace.kept_index)]
    np.testing.assert_array_equal(trace.kept_index, prompt_rows)
    np.testing.assert_allclose(trace.scores, hand.scores, atol=1e-4)
    last = len(trace.kept_index) - 1
    got = torch.cat(out.logits).numpy()
    np.testing.assert_allclose(got, hand.logits[last : last + tokens], atol=TOLERANCE)
    cache = out.past_key_values
    lengths = [cache.get_seq_length(i) for i in range(layers)]
    decoded = tokens - 1
    full, short = made.prompt.input_ids.shape[1] + decoded, len(trace.kept_index) + decoded
    assert lengths == [full] * policy.layer + [short] * (layers - policy.layer)


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
    made = case(heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=layers)
    least = split / layers
    assert_follows_hand(made, Policy(layer=split), Keep(ratio=least + 0.4 * (1 - least)))


@pytest.mark.parametrize("split", [1, 2, 3])
def test_every_split_matches_decoder_by_hand(split):
    assert_follows_hand(case(), Policy(layer=split), Keep(ratio=split / 4 + 0.1))


@pytest.mark.parametrize("scorer", Scorer)
@pytest.mark.parametrize("select", Select)
def test_every_scorer_and_direction_matches_decoder_by_hand(scorer, select):
    assert_follows_hand(
        case(heads=6), Policy(layer=2, scorer=scorer, select=select), Keep(ratio=0.7), tokens=2
    )


@pytest.mark.parametrize("source", Source)
def test_every_source_matches_decoder_by_hand(source):
    assert_follows_hand(
        case(heads=6), Policy(layer=1, scorer=Scorer.RELEASED, source=source), Keep(ratio=0.5), tokens=2
    )


@pytest.mark.parametrize("budget", Budget)
def test_two_pictures_match_decoder_by_hand(budget):
    made = case(sizes=((140, 112), (84, 168)))
    assert len(made.prompt.pictures) == 2
    assert_follows_hand(made, Policy(layer=1, budget=budget), Keep(ratio=0.4))


def test_one_kept_token_matches_decoder_by_hand():
    made = case()
    n = len(made.prompt.visual_index)
    keep = Keep(ratio=(n + 3 * 1.5) / (4 * n))  # (L r N - K N) / (L - K) = 1.5 for L = 4, K = 1
    assert kept_tokens(keep, layers=4, layer=1, visual_tokens=n) == 1
    assert_follows_hand(made, Policy(layer=1), keep)

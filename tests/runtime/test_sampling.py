"""Choosing tokens, against Hugging Face's logits processors."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ep_export.errors import UsageError
from ep_export.runtime.sampling import Sampling, TokenChooser, penalised, probabilities


@pytest.fixture
def logits():
    return np.random.default_rng(3).normal(0, 3, 300).astype(np.float32)


@pytest.mark.parametrize("penalty", [1.05, 1.5, 0.8])
def test_repetition_penalty_equals_huggingface(logits, penalty):
    seen = [0, 7, 7, 299, 41]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([seen]), torch.from_numpy(logits)[None].clone()
    )
    assert np.array_equal(penalised(logits, seen, penalty), expected[0].numpy())


def test_no_penalty_leaves_the_logits_alone(logits):
    assert penalised(logits, [1, 2], 1.0) is logits


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(temperature=2.0, top_k=5),
        Sampling(top_p=0.9),
        Sampling(temperature=1.5, top_p=0.5, top_k=40),
        Sampling(top_p=0.01),
        Sampling(top_k=1),
    ],
    ids=str,
)
def test_chances_equal_huggingface(logits, sampling):
    scores = torch.from_numpy(logits)[None].double()
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    made = probabilities(logits, sampling)
    assert np.allclose(made, scores.softmax(-1)[0].numpy(), atol=1e-12)
    assert made.sum() == pytest.approx(1)


def test_greedy_takes_the_largest_and_remembers_what_it_took(logits):
    chooser = TokenChooser([], repetition_penalty=100.0, sampling=None)
    first = chooser.choose(logits)
    assert first == logits.argmax()
    assert chooser.choose(logits) != first


def test_a_tie_goes_to_the_lower_id():
    chooser = TokenChooser([], repetition_penalty=1.0, sampling=None)
    assert chooser.choose(np.array([0, 2, 2, 1], dtype=np.float32)) == 1


def draws(seed, logits, count=2000, **options):
    chooser = TokenChooser([], repetition_penalty=1.0, sampling=Sampling(seed=seed, **options))
    return [chooser.choose(logits) for _ in range(count)]


def test_the_same_seed_draws_the_same_tokens(logits):
    assert draws(7, logits, 50) == draws(7, logits, 50)
    assert draws(7, logits, 50) != draws(8, logits, 50)


def test_draws_follow_the_chances():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    counts = np.bincount(draws(1, logits, 4000, top_p=0.9), minlength=4) / 4000
    # Three standard deviations of 4000 draws are at most 0.024.
    assert np.allclose(counts, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.024)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_p": float("inf")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": float("nan")},
        {"top_k": float("inf")},
        {"seed": -1},
        {"seed": float("nan")},
        {"temperature": True},
        {"top_p": True},
        {"top_k": True},
        {"seed": False},
        {"top_p": np.bool_(True)},
        {"temperature": np.float32("nan")},
        {"temperature": "warm"},
        {"top_k": None},
    ],
    ids=str,
)
def test_what_is_no_number_or_out_of_range_is_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")) as caught:
        Sampling(**wrong)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers(logits):
    theirs = {"temperature": np.float32(0.5), "top_p": np.float64(0.9), "top_k": np.int64(20)}
    ours = {"temperature": 0.5, "top_p": 0.9, "top_k": 20}
    assert draws(np.uint8(7), logits, 20, **theirs) == draws(7, logits, 20, **ours)

"""Whole answers of exported bundles against Hugging Face, full and pruned, on models of odd shape."""

import dataclasses

import numpy as np
import pytest
import torch
from bundles import export_tiny
from kept_sets import difference_from_exact
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import open_checkpoint
from ep_export.entropy import KeptDifference
from ep_export.families import family_of
from ep_export.policy import Budget, Keep, Scorer, Select, Source
from ep_export.reference import PruneSpec, load_model, prune
from ep_export.runtime import Sampling, Session

FAMILY = family_of("qwen2_5_vl")
QUESTION = "which digits are in the picture?"
TOKENS = 8
LOGIT_TOLERANCE = 1e-3  # float32 through two runtimes that sum in different orders
PICTURES = {"none": [], "wide": [(300, 90)], "two": [(130, 200), (90, 60)]}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and where it is pruned."""

    model: dict
    policy: dict


SHAPES = {
    "6/2 heads of 128, K 1 of 3": Shape(
        {"heads": 6, "kv_heads": 2, "head_dim": 128, "layers": 3}, {"layer": 1}
    ),
    "7/1 heads of 16, K 4 of 5": Shape(
        {"heads": 7, "kv_heads": 1, "head_dim": 16, "layers": 5, "repetition_penalty": 1.2},
        {
            "layer": 4,
            "keep": 0.9,
            "scorer": Scorer.NORM,
            "select": Select.LOWEST,
            "budget": Budget.PER_PICTURE,
        },
    ),
    "16/4 heads of 40, K 3 of 9": Shape(
        {"heads": 16, "kv_heads": 4, "head_dim": 40, "layers": 9, "tie_embeddings": True, "ffn_size": 600},
        {"layer": 3, "scorer": Scorer.RELEASED, "source": Source.KEY},
    ),
}


class Pair:
    """A bundle's session beside the Hugging Face model it was made from."""

    def __init__(self, root, shape):
        checkpoint = make_tiny(root / "checkpoint", seed=3, **shape.model)
        self.bundle = export_tiny(checkpoint, root / "bundle", **shape.policy)
        self.session = Session.open(self.bundle, threads=1)
        self.model = load_model(open_checkpoint(str(checkpoint)))
        self.policy = self.bundle.manifest.policy

    def inputs(self, prompt):
        return FAMILY.reference_inputs(prompt, self.model.config)

    def logits(self, prompt):
        with torch.inference_mode():
            return self.model(**self.inputs(prompt)).logits[0, -1].numpy()

    def tokens(self, prompt):
        """`generate` with the checkpoint's own generation settings."""
        with torch.inference_mode():
            ids = self.model.generate(**self.inputs(prompt), max_new_tokens=TOKENS, do_sample=False)
        return ids[0, prompt.input_ids.shape[1] :].tolist()


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"), SHAPES[request.param])


@pytest.fixture(params=PICTURES)
def pictures(request):
    return [tiny_picture(*size, seed=i) for i, size in enumerate(PICTURES[request.param])]


def test_everything_kept_answers_as_huggingface(pair, pictures):
    prompt = pair.session.prompts.build(pictures, QUESTION)
    made = pair.session.prefill(prompt, Keep(ratio=1.0))
    assert np.abs(made.logits - pair.logits(prompt)).max() < LOGIT_TOLERANCE
    assert np.array_equal(made.kept_index, np.arange(prompt.input_ids.shape[1]))
    answer = pair.session.generate(pictures, QUESTION, max_new_tokens=TOKENS, keep=Keep(ratio=1.0))
    assert list(answer.token_ids) == pair.tokens(prompt)


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("pictures", ["wide", "two"], indirect=True)
def test_pruned_answers_as_the_oracle(pair, pictures, share):
    """`share` of what layers 0..K-1 leave to choose: K of L layers see everything whatever is asked for."""
    layers = pair.bundle.manifest.dims.layers
    keep = Keep(ratio=(pair.policy.layer + share * (layers - pair.policy.layer)) / layers)
    prompt = pair.session.prompts.build(pictures, QUESTION)
    made = pair.session.prefill(prompt, keep)
    kept = made.kept_index[np.isin(made.kept_index, prompt.visual_index)]
    with prune(pair.model, PruneSpec(pair.policy, keep)) as trace:
        pair.logits(prompt)
    assert kept.shape[0] == int(share * prompt.visual_index.shape[0])
    assert difference_from_exact(trace, kept, pair.bundle.manifest) is not KeptDifference.DIFFERENT
    ours = torch.from_numpy(kept)
    with prune(pair.model, PruneSpec(pair.policy, keep), select=lambda *_: ours):
        expected, tokens = pair.logits(prompt), pair.tokens(prompt)
    assert np.abs(made.logits - expected).max() < LOGIT_TOLERANCE
    answer = pair.session.generate(pictures, QUESTION, max_new_tokens=TOKENS, keep=keep)
    assert list(answer.token_ids) == tokens
    assert answer.kept_index == tuple(made.kept_index.tolist())


def test_a_prompt_leaves_nothing_behind_for_the_next(pair):
    pictures = [tiny_picture(90, 120)]
    first = pair.session.generate(pictures, QUESTION, max_new_tokens=4)
    pair.session.generate([], "hello", max_new_tokens=4)
    assert pair.session.generate(pictures, QUESTION, max_new_tokens=4).token_ids == first.token_ids


def test_sampling_is_reproducible(pair):
    def draw(seed):
        sampling = Sampling(temperature=1.5, top_p=0.95, top_k=50, seed=seed)
        return pair.session.generate(
            [tiny_picture(60, 60)], QUESTION, max_new_tokens=8, sampling=sampling
        ).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)

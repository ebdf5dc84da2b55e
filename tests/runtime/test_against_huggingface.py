"""Whole answers of exported bundles against Hugging Face, full and pruned, on models of odd shape."""

import dataclasses
from typing import ClassVar

import pytest
from family_pair import QUESTION, FamilyPair, FamilyTests
from tiny import make_tiny, tiny_picture

from ep_export.bundle import Dialect
from ep_export.policy import Budget, Scorer, Select, Source, TopK
from ep_export.runtime import Sampling


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
            "chooser": TopK(Scorer.NORM, Select.LOWEST, budget=Budget.PER_PICTURE),
        },
    ),
    "16/4 heads of 40, K 3 of 9, modern dialect": Shape(
        {"heads": 16, "kv_heads": 4, "head_dim": 40, "layers": 9, "tie_embeddings": True, "ffn_size": 600},
        {"layer": 3, "chooser": TopK(Scorer.RELEASED, source=Source.KEY), "dialect": Dialect.MODERN},
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    root, shape = tmp_path_factory.mktemp("pair"), SHAPES[request.param]
    return FamilyPair(make_tiny(root / "checkpoint", seed=3, **shape.model), root / "bundle", **shape.policy)


class TestAnswers(FamilyTests):
    prompts: ClassVar = {
        "none": [],
        "wide": [tiny_picture(300, 90)],
        "two": [tiny_picture(130, 200), tiny_picture(90, 60, seed=1)],
    }
    shapes: ClassVar = prompts["two"]


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

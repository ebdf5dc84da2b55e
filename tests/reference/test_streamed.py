"""A model whose weights are in memory only while they are used computes what the whole one computes."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import tiny_picture
from tiny_families import TINY_FAMILIES

from ep_export.calibrate.weights import calibrate_layers
from ep_export.checkpoint import open_checkpoint
from ep_export.numerics import WeightKind, Weights
from ep_export.reference import load_model, streamed
from ep_export.reference.streamed import StreamedModel


@pytest.fixture(params=TINY_FAMILIES)
def checkpoint(request, tmp_path):
    return open_checkpoint(str(TINY_FAMILIES[request.param](tmp_path / request.param)))


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    """Tiny models have small parameters only, which would otherwise stay."""
    monkeypatch.setattr(streamed, "_SMALL", 0)


def bytes_of(model) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


def test_it_computes_the_same_and_is_empty_again(checkpoint):
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    prompt = builder.build([tiny_picture(120, 90)], "what is this")
    lazy = StreamedModel(checkpoint)
    assert bytes_of(lazy.model) < 2000
    whole = load_model(checkpoint)
    inputs = checkpoint.family.reference_inputs(prompt, checkpoint.config)
    with torch.inference_mode():
        assert torch.equal(lazy.model(**inputs).logits, whole(**inputs).logits)
    assert bytes_of(lazy.model) < 2000 < bytes_of(whole)


def test_calibrated_rounding_is_that_of_the_whole_model(checkpoint):
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    prompts = [builder.build([tiny_picture(120, 90, seed=seed)], "what is this") for seed in range(2)]
    settings = Weights(WeightKind.INT4, 16, "gptq")
    lazy = StreamedModel(checkpoint)

    def layers(model, held):
        return dict(
            calibrate_layers(model, checkpoint.family, prompts, settings, scales="float16", held=held)
        )

    ours = layers(lazy.model, lazy.held)
    theirs = layers(load_model(checkpoint), lambda _layer: nullcontext())
    assert list(ours) == list(theirs)
    for name, linear in theirs.items():
        assert np.array_equal(ours[name].codes, linear.codes), name
        assert np.array_equal(ours[name].scales, linear.scales), name

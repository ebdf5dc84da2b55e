"""Head and tail in ONNX Runtime against Hugging Face's own modules in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import Decoder, TorchDecoder, hugging_face, random_prompt

from ep_export.bundle import Bundle, Dialect
from ep_export.entropy import select_tokens, series_scores
from ep_export.policy import Scorer, Select

# (layers, heads, kv_heads, head_dim), K and dialect: odd shapes on purpose.
CASES = [
    ((3, 6, 2, 16), 1, Dialect.PORTABLE),
    ((3, 6, 2, 16), 1, Dialect.MODERN),
    ((4, 7, 1, 40), 3, Dialect.PORTABLE),
    ((9, 16, 4, 16), 4, Dialect.PORTABLE),
    ((3, 4, 4, 128), 2, Dialect.MODERN),
]
# Both sides compute in float32 with another order of operations; 3e-6 was seen.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES, ids=str)
def decoder(request: pytest.FixtureRequest, bundle_of: Callable[..., Bundle]) -> Decoder:
    return Decoder(bundle_of(*request.param))


@pytest.fixture(scope="module")
def reference(decoder: Decoder, checkpoint_of: Callable[..., Path]) -> TorchDecoder:
    dims = decoder.bundle.manifest.dims
    return TorchDecoder(hugging_face(checkpoint_of((dims.layers, dims.heads, dims.kv_heads, dims.head_dim))))


def test_keeping_all_equals_the_unpruned_model_in_prefill_and_decode(
    decoder: Decoder, reference: TorchDecoder
) -> None:
    embeds, positions, visual = random_prompt(decoder.bundle.manifest.dims.hidden_size)
    decoder.reset()
    got = decoder(embeds, positions, visual, len(visual))
    assert got["kept_index"].tolist() == list(range(embeds.shape[1]))

    language = reference.model.model.language_model
    output = language(
        inputs_embeds=torch.from_numpy(embeds), position_ids=torch.from_numpy(positions), use_cache=True
    )
    expected = reference.model.lm_head(output.last_hidden_state[:, -1:])
    np.testing.assert_allclose(got["logits"], expected, atol=TOLERANCE)

    step = np.random.default_rng(1).standard_normal((1, 1, embeds.shape[2])).astype(np.float32)
    got = decoder.step(step, 40)
    output = language(
        inputs_embeds=torch.from_numpy(step),
        position_ids=torch.full((3, 1, 1), 40),
        past_key_values=output.past_key_values,
    )
    np.testing.assert_allclose(
        got["logits"], reference.model.lm_head(output.last_hidden_state), atol=TOLERANCE
    )


def test_pruned_equals_the_pruned_layers(decoder: Decoder, reference: TorchDecoder) -> None:
    embeds, positions, visual = random_prompt(decoder.bundle.manifest.dims.hidden_size)
    keep, layer = 7, decoder.bundle.manifest.policy.layer
    decoder.reset()
    got = decoder(embeds, positions, visual, keep)

    def kept(states: torch.Tensor, _hidden: torch.Tensor) -> torch.Tensor:
        degree = decoder.bundle.manifest.degree
        scores = series_scores(states[torch.from_numpy(visual)], Scorer.PAPER, degree)
        chosen = select_tokens(scores, keep, select=Select.HIGHEST, visual_index=torch.from_numpy(visual))
        text = np.setdiff1d(np.arange(embeds.shape[1]), visual)
        return torch.tensor(sorted([*text, *np.asarray(chosen).tolist()]))

    logits, entering, cache = reference(torch.from_numpy(embeds), torch.from_numpy(positions), layer, kept)
    np.testing.assert_allclose(got["hidden_states"], entering, atol=TOLERANCE)
    np.testing.assert_allclose(got["logits"], logits, atol=TOLERANCE)
    for i in range(decoder.bundle.manifest.dims.layers):
        np.testing.assert_allclose(decoder.caches[f"{i}.key"], cache.layers[i].keys, atol=TOLERANCE)
        np.testing.assert_allclose(decoder.caches[f"{i}.value"], cache.layers[i].values, atol=TOLERANCE)

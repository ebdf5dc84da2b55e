from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from ep_export.entropy import token_scores
from ep_export.policy import Scorer


def draw(tokens: int, heads: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed))


def primal_spectrum(states: np.ndarray, normalise: bool) -> np.ndarray:
    """Eigenvalues of the head_dim x head_dim covariance of one token, plain NumPy."""
    rows = states - states.mean(axis=0)
    if normalise:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.clip(np.linalg.eigvalsh(rows.T @ rows / len(rows)), 0, None)


def entropy(spectrum: np.ndarray) -> float:
    positive = spectrum[spectrum > 1e-14]
    return float(-(positive * np.log(positive)).sum())


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (7, 128), (28, 128), (32, 40), (16, 8)])
def test_paper_score_from_the_dual_equals_the_primal_covariance_in_numpy(heads: int, head_dim: int) -> None:
    states = draw(5, heads, head_dim)
    expected = [entropy(primal_spectrum(token, True)) for token in states.double().numpy()]
    np.testing.assert_allclose(token_scores(states, Scorer.PAPER), expected, atol=1e-10)


def test_released_score_is_the_authors_formula() -> None:
    states = draw(6, 12, 64)
    expected = []
    for token in states.double().numpy():
        rows = token - token.mean(axis=0)
        values = np.clip(np.linalg.eigvalsh(rows @ rows.T / 12), 1e-10, None)
        expected.append(-(values * np.log(values)).sum() / np.log(12))
    np.testing.assert_allclose(token_scores(states, Scorer.RELEASED), expected, rtol=1e-12)


def test_order2_score_is_minus_log_purity_of_the_primal_covariance() -> None:
    states = draw(6, 9, 32)
    expected = [-np.log((primal_spectrum(token, True) ** 2).sum()) for token in states.double().numpy()]
    np.testing.assert_allclose(token_scores(states, Scorer.ORDER2), expected, atol=1e-12)


def test_norm_score_is_the_length_of_the_whole_token() -> None:
    states = draw(6, 9, 32)
    expected = np.linalg.norm(states.double().numpy().reshape(6, -1), axis=1)
    np.testing.assert_allclose(token_scores(states, Scorer.NORM), expected, rtol=1e-14)


@pytest.mark.parametrize("scorer", list(Scorer))
@pytest.mark.parametrize("family", ["1d", "mrope"])
def test_scores_do_not_depend_on_rotary_position(scorer: Scorer, family: str) -> None:
    tokens, heads, head_dim = 24, 6, 32
    states = draw(tokens, heads, head_dim).double()
    before = states.transpose(0, 1)[None]  # [1, heads, tokens, head_dim], as Hugging Face rotates it
    positions = torch.randint(0, 3000, (3, 1, tokens), generator=torch.Generator().manual_seed(1))
    shape = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_key_value_heads": heads}
    if family == "1d":
        cos, sin = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**shape))(before, positions[0])
        rotated, _ = modeling_llama.apply_rotary_pos_emb(before, before, cos, sin)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
        config = Qwen2_5_VLTextConfig(**shape, rope_parameters=rope)
        cos, sin = modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding(config)(before, positions)
        rotated, _ = modeling_qwen2_5_vl.apply_rotary_pos_emb(before, before, cos, sin)
    after = rotated[0].transpose(0, 1)
    assert (after - states).abs().max() > 0.5  # it did rotate
    # the tables are float32, so Q is orthogonal to about 1e-7
    torch.testing.assert_close(
        token_scores(after, scorer), token_scores(states, scorer), atol=2e-6, rtol=2e-6
    )


def test_entropy_is_zero_for_a_token_without_variety_and_ln_of_rank_for_an_even_one() -> None:
    states = torch.zeros(3, 4, 8)
    states[1] = torch.randn(8, generator=torch.Generator().manual_seed(0))  # all heads alike
    states[2, :, :4] = torch.eye(4)
    scores = token_scores(states, Scorer.PAPER)
    assert scores[:2].tolist() == [0.0, 0.0]
    # centring a simplex of 4 leaves 3 equal directions
    assert scores[2].item() == pytest.approx(math.log(3), abs=1e-12)


@pytest.mark.parametrize("scorer", list(Scorer))
def test_one_head_and_no_tokens_are_scored(scorer: Scorer) -> None:
    assert torch.isfinite(token_scores(draw(3, 1, 16), scorer)).all()
    assert token_scores(draw(0, 4, 16), scorer).shape == (0,)


@pytest.mark.parametrize("scorer", list(Scorer))
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_token_scores_nan_and_leaves_the_others_alone(scorer: Scorer, bad: float) -> None:
    states = draw(5, 6, 16)
    clean = token_scores(states, scorer)
    states[2, 3, 4] = bad
    scores = token_scores(states, scorer)
    assert math.isnan(scores[2])
    others = [0, 1, 3, 4]
    assert torch.equal(scores[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_scored_in_float64(dtype: torch.dtype) -> None:
    states = draw(4, 5, 16).to(dtype)
    scores = token_scores(states, Scorer.PAPER)
    assert scores.dtype == torch.float64
    assert torch.equal(scores, token_scores(states.double(), Scorer.PAPER))


def test_chunks_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    from ep_export.entropy import scores

    states = draw(11, 4, 16)
    whole = token_scores(states, Scorer.PAPER)
    monkeypatch.setattr(scores, "_TOKENS_AT_ONCE", 4)
    torch.testing.assert_close(token_scores(states, Scorer.PAPER), whole, atol=1e-14, rtol=0)

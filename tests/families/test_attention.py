"""The portable forms against PyTorch and complex numbers, and one set of forms a thread."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from ep_export.families.attention import (
    PORTABLE_VISION,
    attention,
    portable_attention,
    rotary_tables,
    rotate,
    use_vision_forms,
)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "masked"),
    [(1, 6, 2, True), (1, 4, 4, True), (1, 6, 2, False), (3, 4, 4, True), (3, 4, 2, False)],
)
def test_portable_attention_equals_pytorch(batch: int, heads: int, kv_heads: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def states(count: int, length: int) -> torch.Tensor:
        return torch.randn(batch, count, length, 8, generator=generator, dtype=torch.float32)

    query, key, value = states(heads, 5), states(kv_heads, 9), states(kv_heads, 9)
    mask = torch.randn(batch, 1, 5, 9, generator=generator) if masked else None
    got = portable_attention(query, key, value, mask, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    # sums of 9 products in float32, in another order
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_a_mask_for_several_prompts_with_shared_key_heads_is_refused() -> None:
    states = torch.zeros(2, 4, 3, 8)
    with pytest.raises(NotImplementedError, match="needs batch 1"):
        portable_attention(states, states[:, :2], states[:, :2], torch.zeros(3, 3), 1.0)


def test_attention_of_rows_equals_pytorchs_of_heads() -> None:
    query, key, value = torch.randn(3, 2, 7, 4 * 6, generator=torch.Generator().manual_seed(0))
    mask = torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(1))
    apart = [x.reshape(2, 7, 4, 6).transpose(1, 2) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*apart, attn_mask=mask, scale=0.3)
    got = attention(query, key, value, mask, 0.3, heads=4)
    # sums of 7 products in float32, in another order
    torch.testing.assert_close(got, expected.transpose(1, 2).reshape(2, 7, 24), atol=1e-6, rtol=1e-5)


def test_rotary_embedding_turns_pairs_as_complex_numbers() -> None:
    rng = np.random.default_rng(0)
    states, angles = rng.standard_normal((1, 5, 3, 2, 4)), rng.standard_normal((1, 5, 4))  # 3 heads of 8
    turned = (states[..., 0, :] + 1j * states[..., 1, :]) * np.exp(1j * angles)[:, :, None]
    expected = np.stack([turned.real, turned.imag], axis=-2).reshape(1, 5, 24)
    got = rotate(torch.tensor(states.reshape(1, 5, 24)), *rotary_tables(torch.tensor(angles)), 3)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-14)


def test_forms_hold_for_their_block_and_their_thread() -> None:
    query = torch.zeros(1, 1, 2)
    seen: list[float] = []

    def ask() -> None:
        seen.append(attention(query, query, query, None, 1.0, heads=1).sum().item())

    one, two = (
        replace(PORTABLE_VISION, attention=lambda q, *_, more=more, **__: q + more) for more in (1, 2)
    )
    with use_vision_forms(one):
        ask()
        other = threading.Thread(target=ask)
        other.start()
        other.join()
        with use_vision_forms(two):
            ask()
        ask()
    ask()
    assert seen == [2.0, 0.0, 4.0, 2.0, 0.0]

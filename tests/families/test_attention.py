"""The portable attention against PyTorch's own, and one form a thread."""

from __future__ import annotations

import threading

import pytest
import torch

from ep_export.families.attention import attention, portable_attention, use_attention


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


def test_a_form_holds_for_its_block_and_its_thread() -> None:
    query = torch.zeros(1, 1, 1, 2)
    seen: list[float] = []

    def ask() -> None:
        seen.append(attention(query, query, query, None, 1.0).sum().item())

    with use_attention(lambda q, *_: q + 1):
        ask()
        other = threading.Thread(target=ask)
        other.start()
        other.join()
        with use_attention(lambda q, *_: q + 2):
            ask()
        ask()
    ask()
    assert seen == [2.0, 0.0, 4.0, 2.0, 0.0]

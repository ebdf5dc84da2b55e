"""The one attention every traced module calls, so that a dialect can write it its own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch

__all__ = ["Attention", "attention", "portable_attention", "use_attention"]


class Attention(Protocol):
    """Scaled dot-product attention."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [B, H, S, D].
            key: [B, KVH, T, D]; KVH divides H, query head h reads key head h // (H // KVH).
            value: [B, KVH, T, D].
            mask: Added to the scores, broadcastable to [B, H, S, T]; its head axis has size 1.
            scale: Factor on the scores.

        Returns:
            [B, H, S, D] in the type of `query`.
        """
        ...


def portable_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """MatMul, Softmax in float32, MatMul, in operators every ONNX consumer has; see `Attention`.

    The query heads that share a key head become rows of one product, so that a decode step reads the cache
    once a key head instead of once a query head, and nothing is repeated.

    Raises:
        NotImplementedError: A mask for several prompts whose query heads share key heads.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # The query is scaled before the product: it is the smaller tensor, and in float16 it keeps large products
    # below the overflow at 65504.
    query = (query * scale).reshape(batch, kv_heads, groups * length, width)
    scores = torch.matmul(query, key.transpose(2, 3)).float()
    if mask is not None and groups > 1:
        if batch != 1:
            raise NotImplementedError("a mask with grouped heads needs batch 1")
        split = (kv_heads, groups, length, key.shape[2])
        scores = (scores.reshape(split) + mask).reshape(scores.shape)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.matmul(weights, value).reshape(batch, heads, length, width)


_form: ContextVar[Attention] = ContextVar("attention", default=portable_attention)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The attention of this thread's trace; see `Attention`."""
    return _form.get()(query, key, value, mask, scale)


@contextmanager
def use_attention(form: Attention) -> Iterator[None]:
    """Within the block, in this thread, `attention` is the given form (a dialect's while it is traced)."""
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)

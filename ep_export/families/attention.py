"""The one attention every traced module calls, so that a dialect can write it its own way.

Portable form: MatMul, Softmax, MatMul, in operators every ONNX consumer has.
"""

from __future__ import annotations

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
    """MatMul, Softmax in float32, MatMul; see `Attention`.

    The query is scaled before the product: it is the smaller tensor, and in float16 it keeps the product of
    large heads below the overflow at 65504.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    query = query * scale
    if groups > 1:  # one more axis instead of copies of key and value
        query = query.reshape(batch, key.shape[1], groups, length, width)
        key, value = key.unsqueeze(2), value.unsqueeze(2)
        mask = mask if mask is None else mask.unsqueeze(2)
    scores = torch.matmul(query, key.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.matmul(weights, value).reshape(batch, heads, length, width)


_current: list[Attention] = [portable_attention]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The attention in use; see `Attention`."""
    return _current[-1](query, key, value, mask, scale)


class use_attention:  # noqa: N801 - a context manager, named like a function
    """Within the block, `attention` is the given form (a dialect's while it is traced)."""

    def __init__(self, form: Attention) -> None:
        self._form = form

    def __enter__(self) -> None:
        _current.append(self._form)

    def __exit__(self, *exception: object) -> None:
        _current.pop()

"""What the traced blocks of vision encoders call, so that a dialect can write it its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = [
    "PORTABLE_VISION",
    "Attention",
    "RowAttention",
    "VisionForms",
    "attention",
    "over_heads",
    "portable_attention",
    "portable_rotate",
    "rotary_tables",
    "rotate",
    "use_vision_forms",
]


class Attention(Protocol):
    """Scaled dot-product attention, heads apart."""

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


class RowAttention(Protocol):
    """Scaled dot-product attention over the rows that linear layers give and take."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        *,
        heads: int,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [B, S, H * D].
            key: Likewise.
            value: Likewise.
            mask: [B, 1, S, S], added to the scores.
            scale: Factor on the scores.
            heads: H.

        Returns:
            [B, S, H * D] in the type of `query`.
        """
        ...


@dataclass(frozen=True)
class VisionForms:
    """How vision blocks are written.

    Attributes:
        attention: See `RowAttention`.
        tables: Angles [1, P, D/2] float32 -> what `rotate` reads.
        rotate: (x [1, P, H * D] float32, tables, H) -> x with rotary embedding.
    """

    attention: RowAttention
    tables: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


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


def over_heads(form: Attention) -> RowAttention:
    """The attention of rows through one whose heads are apart."""

    def over_rows(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        *,
        heads: int,
    ) -> torch.Tensor:
        width = query.shape[-1] // heads
        query, key, value = (
            x.reshape(*x.shape[:2], heads, width).transpose(1, 2) for x in (query, key, value)
        )
        return form(query, key, value, mask, scale).transpose(1, 2).flatten(2)

    return over_rows


def portable_rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [.., D]; the minus of the rotation is in the table, not in every layer."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * signed_sin


def _tables(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, P, 1, D]."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).unsqueeze(2), torch.cat([-sin, sin], dim=-1).unsqueeze(2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, heads: int) -> torch.Tensor:
    apart = x.reshape(*x.shape[:2], heads, x.shape[2] // heads)
    return portable_rotate(apart, cos, signed_sin).flatten(2)


PORTABLE_VISION = VisionForms(over_heads(portable_attention), _tables, _rotate)

_forms: ContextVar[VisionForms] = ContextVar("vision forms", default=PORTABLE_VISION)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    *,
    heads: int,
) -> torch.Tensor:
    """The attention of this thread's trace; see `RowAttention`."""
    return _forms.get().attention(query, key, value, mask, scale, heads=heads)


def rotary_tables(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary tables of this thread's trace; see `VisionForms`."""
    return _forms.get().tables(angles)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    """The rotary embedding of this thread's trace; see `VisionForms`."""
    return _forms.get().rotate(x, cos, sin, heads)


@contextmanager
def use_vision_forms(forms: VisionForms) -> Iterator[None]:
    """Within the block, in this thread, vision blocks are written in the given forms (a dialect's)."""
    token = _forms.set(forms)
    try:
        yield
    finally:
        _forms.reset(token)

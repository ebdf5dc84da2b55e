"""Qwen2.5-VL's vision encoder, rewritten so that it can be traced with any picture size.

Hugging Face computes the window layout inside the model from the picture's grid, which needs values at trace
time. Here the host computes it (`ep_export.families.windows`) and the graph only gathers. The hidden state
keeps the prompt's order throughout: linear layers run over the P patches, never over padding, and only query,
key and value move into windows and back. The modules and parameters are the Hugging Face model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ep_export.families.attention import attention

__all__ = ["FullBlock", "PatchMerger", "VisionStem", "WindowBlock"]

# What a slot without a patch adds to its scores: exp() of it is 0 in float32, and it is finite, so that no
# runtime has to reason about infinities.
_HIDDEN = -1e9


class VisionStem(nn.Module):
    """Patch embedding, rotary tables and window layout.

    The buffer `inv_freq` holds real values even when the model's parameters are on `meta`.
    """

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.proj = visual.patch_embed.proj
        with torch.device("cpu"):
            inv_freq = type(visual.rotary_pos_emb)(visual.config).inv_freq
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", inv_freq.detach().clone(), persistent=False)

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_positions: torch.Tensor,
        window_index: torch.Tensor,
        window_inverse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embed patches.

        Args:
            pixel_values: [P, channels * time * patch * patch] float32.
            patch_positions: [P, 2] int64, row and column.
            window_index: [W, T] int64, the patch in every slot or -1.
            window_inverse: [P] int64, the slot of every patch.

        Returns:
            hidden [P, C]; cos and sin [P, 1, D] float32; slots [W, T] int64 without marks; mask [W, 1, T, T]
            float32; `window_inverse`.
        """
        weight = self.proj.weight  # a convolution whose stride is its kernel is a matrix product
        hidden = nn.functional.linear(pixel_values.to(weight.dtype), weight.flatten(1))
        half = (patch_positions.unsqueeze(-1).float() * self.inv_freq).flatten(
            1
        )  # [P, D/2]: rows, then columns
        angles = torch.cat([half, half], dim=-1).unsqueeze(1)
        mask = (window_index < 0).float().mul(_HIDDEN).unsqueeze(1).unsqueeze(1)
        mask = mask.expand(-1, -1, window_index.shape[1], -1)  # ONNX's Attention wants the query axis whole
        return hidden, angles.cos(), angles.sin(), window_index.clamp(min=0), mask, window_inverse


class _Block(nn.Module):
    """What window and full blocks share: everything but the shape of attention."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.qkv, self.proj = block.attn.qkv, block.attn.proj
        self.heads: int = block.attn.num_heads
        self.scale: float = block.attn.scaling

    def _query_key_value(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated query and key, and value, [P, H, D] each."""
        qkv = self.qkv(self.norm1(hidden))
        query, key, value = qkv.reshape(hidden.shape[0], 3, self.heads, -1).unbind(1)
        return _rotate(query, cos, sin), _rotate(key, cos, sin), value

    def _finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residuals and feed-forward; `attended` is [P, H * D]."""
        hidden = hidden + self.proj(attended)
        finished: torch.Tensor = hidden + self.mlp(self.norm2(hidden))
        return finished


class FullBlock(_Block):
    """Attention over all patches of the picture."""

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,  # noqa: ARG002 - every block takes the same values
        mask: torch.Tensor,  # noqa: ARG002
        window_inverse: torch.Tensor,  # noqa: ARG002
    ) -> torch.Tensor:
        """[P, C] -> [P, C]."""
        states = self._query_key_value(hidden, cos, sin)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in states)
        attended = attention(query, key, value, None, self.scale)  # [1, H, P, D]
        return self._finish(hidden, attended.squeeze(0).transpose(0, 1).flatten(1))


class WindowBlock(_Block):
    """Attention within each window: W batched products of T x T instead of one of P x P."""

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        mask: torch.Tensor,
        window_inverse: torch.Tensor,
    ) -> torch.Tensor:
        """[P, C] -> [P, C]."""
        states = self._query_key_value(hidden, cos, sin)
        # [P, H, D] -> [W, T, H, D] -> [W, H, T, D]
        query, key, value = (
            x.index_select(0, slots.flatten()).reshape(*slots.shape, self.heads, -1).transpose(1, 2)
            for x in states
        )
        attended = attention(query, key, value, mask, self.scale)
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)  # [W * T, H * D]
        return self._finish(hidden, attended.index_select(0, window_inverse))


class PatchMerger(nn.Module):
    """Merge blocks of patches into visual tokens of the decoder's width."""

    def __init__(self, merger: Any) -> None:
        super().__init__()
        self.ln_q, self.mlp = merger.ln_q, merger.mlp
        self.width: int = merger.hidden_size

    def forward(self, hidden: torch.Tensor, *carry: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """[P, C] -> [N, d]."""
        merged: torch.Tensor = self.mlp(self.ln_q(hidden).reshape(-1, self.width))
        return merged


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in float32, as Hugging Face; states [P, H, D], tables [P, 1, D]."""
    x = states.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)

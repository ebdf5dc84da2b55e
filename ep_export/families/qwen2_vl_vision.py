"""The vision encoder of Qwen2-VL, rewritten so that it can be traced with any picture size.

What the host knows of the picture's grid comes in as feeds; Hugging Face computes it inside the model, which
needs values at trace time. The modules and parameters are the Hugging Face model's own. Qwen2.5-VL builds on
these parts (`qwen2_5_vl_vision`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ep_export.families.attention import attention, rotary_tables, rotate

__all__ = ["FullBlock", "PatchMerger", "VisionBlock", "VisionStem"]


class VisionStem(nn.Module):
    """Patch embedding and rotary tables.

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
        self, pixel_values: torch.Tensor, patch_positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embed patches.

        Args:
            pixel_values: [P, channels * time * patch * patch] float32.
            patch_positions: [P, 2] int64, row and column.

        Returns:
            hidden [P, C]; two rotary tables, float32, as `rotate` reads them.
        """
        weight = self.proj.weight  # a convolution whose stride is its kernel is a matrix product
        hidden = nn.functional.linear(pixel_values.to(weight.dtype), weight.flatten(1))
        half = (patch_positions.unsqueeze(-1).float() * self.inv_freq).flatten(1)  # [P, D/2]: rows, columns
        return hidden, *rotary_tables(half.unsqueeze(0))


class VisionBlock(nn.Module):
    """What window and full blocks share: everything but the shape of attention."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.qkv, self.proj = block.attn.qkv, block.attn.proj
        self.heads: int = block.attn.num_heads
        self.scale: float = block.attn.scaling

    def query_key_value(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated query and key, and value, [1, P, C] each.

        Three products with thirds of the weight, whose rows lie apart already, so that no result is cut.
        """
        normed = self.norm1(hidden).unsqueeze(0)
        query, key, value = (
            nn.functional.linear(normed, weight, bias)
            for weight, bias in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        )
        # in float32, as Hugging Face
        query, key = (rotate(x.float(), cos, sin, self.heads).to(x.dtype) for x in (query, key))
        return query, key, value

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residuals and feed-forward; `attended` is [P, H * D]."""
        hidden = hidden + self.proj(attended)
        finished: torch.Tensor = hidden + self.mlp(self.norm2(hidden))
        return finished


class FullBlock(VisionBlock):
    """Attention over all patches of the picture."""

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *carry: torch.Tensor,  # noqa: ARG002 - what blocks of another kind take
    ) -> torch.Tensor:
        """[P, C] -> [P, C]."""
        states = self.query_key_value(hidden, cos, sin)
        return self.finish(hidden, attention(*states, None, self.scale, heads=self.heads).squeeze(0))


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

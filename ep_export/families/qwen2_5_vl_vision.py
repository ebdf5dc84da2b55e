"""What Qwen2.5-VL's vision encoder adds to Qwen2-VL's: attention within windows.

Hugging Face computes the window layout inside the model from the picture's grid, which needs values at trace
time. Here the host computes it (`ep_export.families.windows`) and the graph only gathers. The hidden state
keeps the prompt's order throughout: linear layers run over the P patches, never over padding, and only query,
key and value move into windows and back.
"""

from __future__ import annotations

import torch
from torch import nn

from ep_export.families.attention import attention
from ep_export.families.qwen2_vl_vision import VisionBlock, VisionStem

__all__ = ["WindowBlock", "WindowStem"]


class WindowStem(nn.Module):
    """The stem of Qwen2-VL, and the window layout handed on."""

    def __init__(self, stem: VisionStem) -> None:
        super().__init__()
        self.stem = stem

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
            hidden [P, C]; two rotary tables; slots [W, T] int64, a patch in each; mask [W, 1, T, T] float32,
            added to the scores; `window_inverse`.
        """
        hidden, cos, sin = self.stem(pixel_values, patch_positions)
        # A slot without a patch repeats the window's first, and n equal keys count as one when each score is
        # log n less: exact, and no score lies so low that exp() of it underflows, which costs a CPU hundreds
        # of cycles (a Softmax of windows took seven times as long).
        first = window_index[:, :1]
        slots = torch.where(window_index < 0, first, window_index)
        equal = (slots == first).float()
        mask = equal * -equal.sum(1, keepdim=True).log()
        mask = mask.unsqueeze(1).unsqueeze(1)
        mask = mask.expand(-1, -1, slots.shape[1], -1)  # ONNX's Attention wants the query axis whole
        return hidden, cos, sin, slots, mask, window_inverse


class WindowBlock(VisionBlock):
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
        states = self.query_key_value(hidden, cos, sin)
        windows = (*slots.shape, hidden.shape[1])
        query, key, value = (x.index_select(1, slots.flatten()).reshape(windows) for x in states)
        attended = attention(query, key, value, mask, self.scale, heads=self.heads)  # [W, T, C]
        return self.finish(hidden, attended.flatten(0, 1).index_select(0, window_inverse))

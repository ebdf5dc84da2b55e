"""What LLaVA-OneVision puts behind the SigLIP tower: visual tokens as weighted sums of features."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["TileMixer"]


class TileMixer(nn.Module):
    """Projects the features of all tiles and mixes them, and newlines, in the prompt's order."""

    def __init__(self, projector: nn.Module, image_newline: nn.Parameter) -> None:
        super().__init__()
        self.projector = projector
        self.image_newline = image_newline

    def forward(
        self, hidden: torch.Tensor, pack_index: torch.Tensor, pack_weight: torch.Tensor
    ) -> torch.Tensor:
        """[tiles, T, C], [N, 4] int64 and [N, 4] float32 -> [N, d].

        The four gathers follow each other: together they would hold four times the visual tokens at once.
        """
        table = torch.cat([self.projector(hidden), self.image_newline.unsqueeze(0)])
        mixed = pack_weight[:, :1] * table.index_select(0, pack_index[:, 0]).float()
        for corner in range(1, 4):
            share = pack_weight[:, corner : corner + 1]
            mixed = mixed + share * table.index_select(0, pack_index[:, corner]).float()
        return mixed.to(table.dtype)

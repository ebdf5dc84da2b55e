"""What LLaVA-NeXT puts around the CLIP tower: any number of tiles in, packed visual tokens out."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["TilePacker", "TileStem"]


class TileStem(nn.Module):
    """The tower's stem; hands the layout on."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, pixel_values: torch.Tensor, *layout: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[tiles, 3, height, width] float32 and the layout -> [tiles, T, C] and the layout."""
        return self.stem(pixel_values), *layout


class TilePacker(nn.Module):
    """Projects the features of all tiles and gathers them, and newlines, in the prompt's order."""

    def __init__(self, projector: nn.Module, image_newline: nn.Parameter) -> None:
        super().__init__()
        self.projector = projector
        self.image_newline = image_newline

    def forward(self, hidden: torch.Tensor, pack_index: torch.Tensor) -> torch.Tensor:
        """[tiles, T, C] and [N] -> [N, d]."""
        table = torch.cat([self.projector(hidden), self.image_newline.unsqueeze(0)])
        return table.index_select(0, pack_index)

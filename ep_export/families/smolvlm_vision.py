"""What SmolVLM puts around the SigLIP blocks: tiles in, shuffled and projected visual tokens out.

Every tile is a square of one size, so nothing is interpolated or masked. The modules and parameters are the
Hugging Face model's own. Linear layers see matrices, so that tiles may vary in number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ep_export.families.clip_tower import SiglipStem

__all__ = ["ShuffleProjector", "SmolVLMStem", "patch_places"]


def patch_places(side: int) -> torch.Tensor:
    """Which row of the position table every patch of a full tile reads.

    Hugging Face finds the rows as fractions of a tile, in float32: patch i looks for the bucket of i / side.
    At some sides (25, 29, 31, ..; none of the published 26, 27 and 32) rounding puts neighbours into one
    bucket. The model was trained that way, so it is done that way here.

    Args:
        side: Patches along a tile's side.

    Returns:
        [side * side] int64, row-major.
    """
    step = 1.0 / torch.tensor(side, device="cpu")
    shares = (torch.arange(side, dtype=torch.float32, device="cpu") * step).clamp(max=1.0 - 1e-6)
    borders = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32, device="cpu")
    bucket = torch.bucketize(shares, borders, right=True)
    return (bucket[:, None] * side + bucket[None, :]).flatten()


class SmolVLMStem(SiglipStem):
    """SigLIP's stem with the positions as Hugging Face finds them for tiles."""

    places: torch.Tensor

    def __init__(self, tower: Any) -> None:
        super().__init__(tower)
        self.register_buffer("places", patch_places(self.side), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, height, width] float32 -> [tiles, patches, C]."""
        positions: torch.Tensor = self.position_embedding.weight.index_select(0, self.places)
        return self.patches(pixel_values) + positions


class ShuffleProjector(nn.Module):
    """The tower's last norm, then squares of neighbouring patches as one row each, projected."""

    def __init__(self, tower: Any, connector: Any, *, side: int) -> None:
        super().__init__()
        self.norm = tower.post_layernorm
        self.proj = connector.modality_projection.proj
        self.scale: int = connector.scale_factor
        self.side = side

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tiles, side * side, C] -> [tiles * (side / scale)^2, d], row-major in every tile."""
        scale, cells, width = self.scale, self.side // self.scale, hidden.shape[2]
        squares = self.norm(hidden).reshape(-1, cells, scale, cells, scale, width).transpose(2, 3)
        rows: torch.Tensor = self.proj(squares.reshape(-1, scale * scale * width))
        return rows

"""CLIP's and SigLIP's vision transformers, cut for tracing, and the projector that LLaVA puts behind them.

Every picture, or tile of one, is a square of one size: positions are learned, nothing is interpolated. The
modules and parameters are the Hugging Face model's own; blocks behind the layer whose features are read are
never run. Linear layers see matrices, so that tiles may vary in number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ep_export.families.attention import attention
from ep_export.families.base import VisionTrace
from ep_export.families.clip_features import TowerFeatures

__all__ = ["ClipBlock", "ClipStem", "FeatureProjector", "SiglipStem", "tower_trace"]


class SiglipStem(nn.Module):
    """Patch and position embeddings: all that SigLIP has in front of its first block."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        embeddings = tower.embeddings
        self.patch_embedding = embeddings.patch_embedding
        self.position_embedding = embeddings.position_embedding
        self.patch: int = embeddings.patch_size
        self.side: int = embeddings.image_size // embeddings.patch_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, height, width] float32 -> [tiles, patches, C]."""
        placed: torch.Tensor = self.patches(pixel_values) + self.position_embedding.weight
        return placed

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch embeddings without positions."""
        weight = self.patch_embedding.weight
        side, patch, channels = self.side, self.patch, weight.shape[1]
        if pixel_values.shape[3] > side * patch:  # a convolution drops what is left over
            pixel_values = pixel_values[..., : side * patch, : side * patch]
        cut = pixel_values.reshape(-1, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        rows = cut.reshape(-1, channels * patch * patch).to(weight.dtype)
        # A convolution whose stride is its kernel is a matrix product.
        patches = nn.functional.linear(rows, weight.flatten(1), self.patch_embedding.bias)
        return patches.reshape(-1, side * side, weight.shape[0])


class ClipStem(SiglipStem):
    """The same with a class token in front, and a norm behind."""

    def __init__(self, tower: Any) -> None:
        super().__init__(tower)
        self.class_embedding = tower.embeddings.class_embedding
        self.norm = tower.pre_layrnorm

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, height, width] float32 -> [tiles, 1 + patches, C]."""
        patches = self.patches(pixel_values)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        hidden = torch.cat([first, patches], dim=1) + self.position_embedding.weight
        normed: torch.Tensor = self.norm(hidden)
        return normed


class ClipBlock(nn.Module):
    """One layer of either transformer; attention stays within a tile."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        own = layer.self_attn
        self.layer_norm1, self.layer_norm2, self.mlp = layer.layer_norm1, layer.layer_norm2, layer.mlp
        self.q_proj, self.k_proj, self.v_proj = own.q_proj, own.k_proj, own.v_proj
        self.out_proj = own.out_proj
        self.heads: int = own.num_heads
        self.scale: float = own.scale

    def forward(self, hidden: torch.Tensor, *carry: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """[tiles, T, C] -> [tiles, T, C]; `carry` is for the merger alone."""
        length, width = hidden.shape[1:]
        rows = hidden.reshape(-1, width)
        normed = self.layer_norm1(rows)
        query, key, value = (
            projection(normed).reshape(-1, length, width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attention(query, key, value, None, self.scale, heads=self.heads)
        rows = rows + self.out_proj(attended.reshape(-1, width))
        rows = rows + self.mlp(self.layer_norm2(rows))
        tiles: torch.Tensor = rows.reshape(-1, length, width)
        return tiles


class FeatureProjector(nn.Module):
    """The chosen features as rows of the decoder's width."""

    def __init__(self, projector: Any, features: TowerFeatures) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = projector.linear_1, projector.act, projector.linear_2
        self.first = 0 if features.with_class else features.class_tokens

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tiles, T, C] -> [tiles * features, d]."""
        rows = hidden[:, self.first :].reshape(-1, hidden.shape[2])
        projected: torch.Tensor = self.linear_2(self.act(self.linear_1(rows)))
        return projected


def tower_trace(stem: nn.Module, tower: Any, projector: Any, features: TowerFeatures) -> VisionTrace:
    """Stem, blocks and projector of one square picture, sharing the tower's own parameters."""
    size = features.image_size
    return VisionTrace(
        stem=stem,
        blocks=[ClipBlock(layer) for layer in tower.encoder.layers[: features.blocks]],
        kinds=["full"] * features.blocks,
        merger=FeatureProjector(projector, features),
        carry_names=(),
        example_feeds={"pixel_values": np.zeros((1, 3, size, size), dtype=np.float32)},
        dynamic_axes={},
    )

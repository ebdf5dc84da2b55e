"""What a config says about features read from a CLIP or SigLIP tower. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.errors import UserError
from ep_export.vision_flops import VisionTower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["TowerFeatures", "clip_features", "siglip_features", "tower_shape"]


@dataclass(frozen=True)
class TowerFeatures:
    """Which features of a vision tower become visual tokens.

    Attributes:
        image_size: Side of a picture or tile in pixels.
        patch_size: Side of a patch in pixels.
        blocks: Transformer blocks in front of the features; the ones behind are not run.
        class_tokens: Tokens the tower puts in front of the patches: 1 for CLIP, 0 for SigLIP.
        with_class: Whether they are visual tokens too.
    """

    image_size: int
    patch_size: int
    blocks: int
    class_tokens: int
    with_class: bool

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Visual tokens of one picture or tile."""
        return self.side**2 + self.class_tokens * self.with_class


def clip_features(config: PreTrainedConfig) -> TowerFeatures:
    """Read a LLaVA-like config with a CLIP tower.

    Raises:
        UserError: Another vision tower, sides that differ or hold no patch, features of several layers, or of
            a layer that is not there.
    """
    _refuse_other_tower(config, "clip_vision_model")
    vision = config.vision_config
    _refuse_other_sizes(vision)
    return TowerFeatures(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        blocks=_blocks(config),
        class_tokens=1,
        with_class=config.vision_feature_select_strategy == "full",
    )


def siglip_features(config: PreTrainedConfig) -> TowerFeatures:
    """Read a LLaVA-like config with a SigLIP tower.

    Raises:
        UserError: As `clip_features`; also a class token to be dropped, which SigLIP does not have.
    """
    _refuse_other_tower(config, "siglip_vision_model")
    vision = config.vision_config
    _refuse_other_sizes(vision)
    if config.vision_feature_select_strategy != "full":
        raise UserError(
            f"config has vision_feature_select_strategy {config.vision_feature_select_strategy!r}, "
            "expected 'full'",
            hint="SigLIP has no class token to drop: Hugging Face cannot run such a model either",
        )
    return TowerFeatures(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        blocks=_blocks(config),
        class_tokens=0,
        with_class=False,
    )


def tower_shape(config: PreTrainedConfig, features: TowerFeatures) -> VisionTower:
    """Shape of the encoder: a tower up to the features, and behind it a projector of two matrices."""
    vision, width = config.vision_config, config.get_text_config().hidden_size
    return VisionTower(
        patch_values=vision.num_channels * features.patch_size**2,
        blocks=features.blocks,
        hidden_size=vision.hidden_size,
        heads=vision.num_attention_heads,
        ffn_size=vision.intermediate_size,
        gated=False,
        joined=1,
        projector=(width, width),
        class_tokens=features.class_tokens,
        class_projected=features.with_class,
        tile_side=features.side,
    )


def _refuse_other_tower(config: PreTrainedConfig, expected: str) -> None:
    found = config.vision_config.model_type
    if found != expected:
        raise UserError(
            f"config has the vision tower {found!r}, expected {expected!r}",
            hint="other vision towers are not exported with this family",
        )


def _refuse_other_sizes(vision: PreTrainedConfig) -> None:
    size, patch = vision.image_size, vision.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or not 0 < patch <= size:
        raise UserError(
            f"config has pictures of {size} in patches of {patch}, expected squares of at least one patch",
            hint="such models are not exported",
        )


def _blocks(config: PreTrainedConfig) -> int:
    """Blocks in front of the layer whose features are read."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        if len(layer) != 1:
            raise UserError(
                f"config joins the features of vision layers {list(layer)}, expected one layer",
                hint="such models are not exported",
            )
        layer = layer[0]
    depth: int = config.vision_config.num_hidden_layers
    blocks: int = layer if layer >= 0 else depth + 1 + layer  # hidden states count from the stem's output
    if not 1 <= blocks <= depth:
        raise UserError(
            f"config reads features of vision layer {layer} in a tower of {depth}", hint="check config.json"
        )
    return blocks

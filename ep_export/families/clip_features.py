"""What a config says about features read from a CLIP tower. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ClipFeatures", "clip_features"]


@dataclass(frozen=True)
class ClipFeatures:
    """Which features of a CLIP tower become visual tokens.

    Attributes:
        image_size: Side of a picture or tile in pixels.
        patch_size: Side of a patch in pixels.
        blocks: Transformer blocks in front of the features; the ones behind are not run.
        with_class: Whether the class token is a visual token too.
    """

    image_size: int
    patch_size: int
    blocks: int
    with_class: bool

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


def clip_features(config: PreTrainedConfig) -> ClipFeatures:
    """Read a LLaVA-like config.

    Raises:
        UserError: Another vision tower, features of several layers, or of a layer that is not there.
    """
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise UserError(
            f"config has the vision tower {vision.model_type!r}, expected 'clip_vision_model'",
            hint="other vision towers are not exported with this family",
        )
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        if len(layer) != 1:
            raise UserError(
                f"config joins the features of vision layers {list(layer)}, expected one layer",
                hint="such models are not exported",
            )
        layer = layer[0]
    depth = vision.num_hidden_layers
    blocks = layer if layer >= 0 else depth + 1 + layer  # hidden states count from the stem's output
    if not 1 <= blocks <= depth:
        raise UserError(
            f"config reads features of vision layer {layer} in a tower of {depth}", hint="check config.json"
        )
    return ClipFeatures(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        blocks=blocks,
        with_class=config.vision_feature_select_strategy == "full",
    )

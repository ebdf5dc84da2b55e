"""SmolVLM and SmolVLM2: tiles through SigLIP, squares of patches shuffled into one token each, a small Llama.

Idefics3 is the same network; only the video half of the prompt is SmolVLM's own. In the prompt one picture is
several runs of visual tokens, one a tile with text between: where the budget is `per_picture`, each run is a
picture of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.families.base import DecoderModules, Family, Picture, PromptInputs, VisionTrace
from ep_export.families.language_model import decoder_modules
from ep_export.families.llama_text import text_dims
from ep_export.families.smolvlm_prompt import SmolVLMPrompts, tile_side, tokens_along
from ep_export.vision_flops import VisionCall, VisionTower

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["SmolVLM"]

# A picture is scaled up or down until it is so many tiles long, as all published image processors do: one of
# 640 x 480 becomes 4 x 3 tiles and the picture seen whole. The config does not say how far it is scaled.
_PUBLISHED_TILES = 4


class SmolVLM(Family):
    """Checkpoints whose `model_type` is `smolvlm` or `idefics3`, with a Llama decoder."""

    name = "smolvlm"
    model_types = ("smolvlm", "idefics3")
    verified = (
        "random tiny weights against Hugging Face, full and pruned, pictures and videos; 4 layers of the "
        "2.2B shape exported; published weights, and frames resized by torchvision: not available here"
    )

    def dims(self, config: PreTrainedConfig) -> DecoderDims:
        """Dimensions of the decoder; see `Family.dims`."""
        vision, scale = config.vision_config, config.scale_factor
        sizes = (vision.image_size, vision.patch_size, scale)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise UserError(
                f"config has tiles of {sizes[0]} pixels, patches of {sizes[1]} and scale_factor {scale}, "
                "expected three whole numbers",
                hint="check image_size, patch_size and scale_factor in config.json",
            )
        side = tile_side(config)
        if not side or side % scale:
            raise UserError(
                f"config joins squares of {scale} x {scale} patches in tiles of {side} x {side}, which do "
                "not divide",
                hint="check scale_factor, image_size and patch_size in config.json",
            )
        return text_dims(config)

    def vision_tower(self, config: PreTrainedConfig) -> VisionTower:
        """Shape of the vision encoder; see `Family.vision_tower`."""
        vision = config.vision_config
        return VisionTower(
            patch_values=vision.num_channels * vision.patch_size**2,
            blocks=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            heads=vision.num_attention_heads,
            ffn_size=vision.intermediate_size,
            gated=False,
            joined=config.scale_factor**2,
            projector=(config.text_config.hidden_size,),
            tile_side=tile_side(config),
        )

    def picture_call(
        self, size: tuple[int, int], config: PreTrainedConfig, settings: Mapping[str, Any]
    ) -> VisionCall:
        """The picture in tiles and whole; see `Family.picture_call`."""
        tile = config.vision_config.image_size
        longest = (settings.get("size") or {}).get("longest_edge") or _PUBLISHED_TILES * tile
        along = math.ceil(longest / tile)
        # Sides are scaled twice and rounded up to whole tiles.
        across = max(1, math.ceil(int(along * tile * min(size) / max(size)) / tile))
        split = settings.get("do_image_splitting", True) and along * across > 1
        return _tiles(1 + along * across if split else 1, config)

    def video_calls(
        self,
        size: tuple[int, int],  # noqa: ARG002 - every frame is one square
        frames: int,
        config: PreTrainedConfig,
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> tuple[VisionCall, ...]:
        """A frame a call; see `Family.video_calls`."""
        return (_tiles(1, config),) * frames

    def prompt_builder(self, processor: Path, config: PreTrainedConfig) -> SmolVLMPrompts:
        """Prompt builder from a directory with tokenizer and image processor files."""
        return SmolVLMPrompts(processor, config)

    def vision_feeds(self, picture: Picture, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:  # noqa: ARG002
        """Inputs of `vision_encoder.onnx` for one picture or video frame.

        Returns:
            `pixel_values` [tiles, 3, image_size, image_size] float32.
        """
        return {"pixel_values": picture.pixel_values}

    def reference_inputs(self, prompt: PromptInputs, config: PreTrainedConfig) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Keyword arguments for `forward` and `generate`; to Hugging Face frames are pictures too."""
        import torch

        ids = torch.from_numpy(prompt.input_ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.pictures:
            tiles = np.concatenate([picture.pixel_values for picture in prompt.pictures])[None]
            inputs["pixel_values"] = torch.from_numpy(tiles)
            inputs["pixel_attention_mask"] = torch.ones(tiles.shape[:2] + tiles.shape[3:], dtype=torch.int64)
        return inputs

    def decoder(self, model: PreTrainedModel) -> DecoderModules:
        """The decoder's modules; see `Family.decoder`."""
        return decoder_modules(model, language="text_model")

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""
        from ep_export.families.clip_tower import ClipBlock
        from ep_export.families.smolvlm_vision import ShuffleProjector, SmolVLMStem

        parts: Any = model.model
        tower, size = parts.vision_model, model.config.vision_config.image_size
        layers = tower.encoder.layers
        return VisionTrace(
            stem=SmolVLMStem(tower),
            blocks=[ClipBlock(layer) for layer in layers],  # SigLIP's are CLIP's with another activation
            kinds=["full"] * len(layers),
            merger=ShuffleProjector(tower, parts.connector, side=tile_side(model.config)),
            carry_names=(),
            example_feeds={"pixel_values": np.zeros((3, 3, size, size), dtype=np.float32)},
            dynamic_axes={"pixel_values": {0: "tiles"}},
        )


def _tiles(tiles: int, config: PreTrainedConfig) -> VisionCall:
    side = tile_side(config)
    return VisionCall(tiles, (side, side), tiles * tokens_along(config) ** 2)

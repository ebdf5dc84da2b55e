"""LLaVA-OneVision: a SigLIP tower and Qwen2; a picture whole and in up to 36 tiles, several ones, videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.families.base import Picture, VisionTrace
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import siglip_features
from ep_export.families.llama_text import text_dims
from ep_export.families.llava_next import LlavaNext, refuse_uneven_tiles
from ep_export.families.llava_onevision_prompt import LlavaOnevisionPrompts, most_tiles
from ep_export.families.llava_onevision_tiles import Packing, pack_frame, pack_picture, pack_whole
from ep_export.families.tiles import tile_grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["LlavaOnevision"]

# A photograph of 640 x 480, the size of most benchmark pictures: 729 + 40 x (54 + 1) = 2929 visual tokens.
_TYPICAL_PICTURE = (640, 480)


class LlavaOnevision(LlavaNext):
    """Checkpoints whose `model_type` is `llava_onevision`, with a SigLIP tower and a Qwen2 decoder."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    verified = (
        "random tiny weights in every key layout against Hugging Face, full and pruned: one and several "
        "pictures, a video, both; packing in the published tile sizes; 4 layers of the 7B shape exported; "
        "published weights, and frames resized by torchvision: not available here"
    )

    def dims(self, config: PreTrainedConfig) -> DecoderDims:
        """Dimensions of the decoder; see `Family.dims`."""
        refuse_uneven_tiles(config, siglip_features(config).image_size)
        most_tiles(config)
        return text_dims(config, model_types=("qwen2",))

    def default_visual_tokens(self, config: PreTrainedConfig) -> int:
        """Visual tokens of a 640 x 480 photograph."""
        return int(_tiled(_TYPICAL_PICTURE, config).index.shape[0])

    def prompt_builder(self, processor: Path, config: PreTrainedConfig) -> ChatPrompts:
        """Prompt builder from a directory with tokenizer and image processor files."""
        return LlavaOnevisionPrompts(processor, config)

    def vision_feeds(self, picture: Picture, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:
        """Inputs of `vision_encoder.onnx` for one picture or frame, in the stem's order.

        Returns:
            `pixel_values` [tiles, 3, image_size, image_size] float32; `pack_index` [N, 4] int64 and
            `pack_weight` [N, 4] float32, see `ep_export.families.llava_onevision_tiles.Packing`.
        """
        packing = _packing(picture, config)
        return {
            "pixel_values": picture.pixel_values,
            "pack_index": packing.index,
            "pack_weight": packing.weight,
        }

    def _reference_pictures(
        self, pictures: Sequence[Picture], config: PreTrainedConfig
    ) -> dict[str, NDArray[Any]]:
        arrays = super()._reference_pictures(pictures, config)
        # By this Hugging Face knows that several pictures were not cut into tiles.
        return {**arrays, "batch_num_images": np.array([len(pictures)], dtype=np.int64)}

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""
        from ep_export.families.clip_tower import SiglipStem, tower_trace
        from ep_export.families.llava_next_vision import TileStem
        from ep_export.families.llava_onevision_vision import TileMixer

        parts: Any = model.model
        features, tower = siglip_features(model.config), parts.vision_tower
        plain = tower_trace(SiglipStem(tower), tower, parts.multi_modal_projector, features)
        tile = features.image_size
        size = (2 * tile, tile)
        packing = _tiled(size, model.config)
        tiles = 1 + int(np.prod(tile_grid(size, model.config.image_grid_pinpoints, tile)))
        return VisionTrace(
            stem=TileStem(plain.stem),
            blocks=plain.blocks,
            kinds=plain.kinds,
            merger=TileMixer(plain.merger, parts.image_newline),
            carry_names=("pack_index", "pack_weight"),
            example_feeds={
                "pixel_values": np.zeros((tiles, 3, tile, tile), dtype=np.float32),
                "pack_index": packing.index,
                "pack_weight": packing.weight,
            },
            dynamic_axes={"pixel_values": {0: "tiles"}, "pack_index": {0: "N"}, "pack_weight": {0: "N"}},
        )


def _packing(picture: Picture, config: PreTrainedConfig) -> Packing:
    side = siglip_features(config).side
    if picture.video is not None:
        height, width = picture.token_grid
        return pack_frame(side, last=picture.visual_tokens > height * width)
    return pack_whole(side) if picture.pixel_values.shape[0] == 1 else _tiled(picture.size, config)


def _tiled(size: tuple[int, int], config: PreTrainedConfig) -> Packing:
    features = siglip_features(config)
    tiles = tile_grid(size, config.image_grid_pinpoints, features.image_size)
    return pack_picture(size, tiles, features.side, most_tiles(config))

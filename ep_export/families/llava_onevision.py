"""LLaVA-OneVision: a SigLIP tower and Qwen2; a picture whole and in up to 36 tiles, several ones, videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.families.base import Picture, VisionTrace
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import siglip_features, tower_shape
from ep_export.families.llama_text import text_dims
from ep_export.families.llava_next import LlavaNext, refuse_uneven_tiles
from ep_export.families.llava_onevision_prompt import LlavaOnevisionPrompts, most_tiles
from ep_export.families.llava_onevision_tiles import Packing, pack_frame, pack_picture, pack_whole
from ep_export.families.tiles import tile_grid
from ep_export.vision_flops import VisionCall, VisionTower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["LlavaOnevision"]


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

    def vision_tower(self, config: PreTrainedConfig) -> VisionTower:
        """Shape of the vision encoder; see `Family.vision_tower`."""
        return tower_shape(config, siglip_features(config))

    def picture_call(
        self,
        size: tuple[int, int],
        config: PreTrainedConfig,
        settings: Mapping[str, Any],  # noqa: ARG002 - the config says it
    ) -> VisionCall:
        """The picture whole and in tiles; see `Family.picture_call`."""
        features = siglip_features(config)
        rows, columns = tile_grid(size, config.image_grid_pinpoints, features.image_size)
        tokens = int(_tiled(size, config).index.shape[0])
        return VisionCall(1 + rows * columns, (features.side, features.side), tokens)

    def video_calls(
        self,
        size: tuple[int, int],  # noqa: ARG002 - every frame is one square
        frames: int,
        config: PreTrainedConfig,
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> tuple[VisionCall, ...]:
        """A frame a call; see `Family.video_calls`."""
        side = siglip_features(config).side
        packed = (pack_frame(side, last=frame == frames - 1) for frame in range(frames))
        return tuple(VisionCall(1, (side, side), int(each.index.shape[0])) for each in packed)

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

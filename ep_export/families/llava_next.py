"""LLaVA-NeXT: LLaVA-1.5 that sees a picture twice, whole and cut into tiles of its own shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.families.base import Picture, VisionTrace
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import clip_features
from ep_export.families.llava import Llava
from ep_export.families.llava_next_prompt import LlavaNextPrompts
from ep_export.families.tiles import checked_resolutions, pack_index, tile_grid
from ep_export.vision_flops import VisionCall

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["LlavaNext", "refuse_uneven_tiles"]


class LlavaNext(Llava):
    """Checkpoints whose `model_type` is `llava_next`, with a CLIP tower and a Llama or Mistral decoder."""

    name = "llava_next"
    model_types = ("llava_next",)
    verified = (
        "random tiny weights in every key layout against Hugging Face, full and pruned; 4 layers of the 7B "
        "shape exported; published weights: not available here"
    )

    def dims(self, config: PreTrainedConfig) -> DecoderDims:
        """Dimensions of the decoder; see `Family.dims`."""
        tile = clip_features(config).image_size
        if config.vision_feature_select_strategy != "default":
            raise UserError(
                f"config has vision_feature_select_strategy {config.vision_feature_select_strategy!r}, "
                "expected 'default'",
                hint="class tokens fit into no grid of patches: Hugging Face cannot run such a model either",
            )
        refuse_uneven_tiles(config, tile)
        return super().dims(config)

    def picture_call(
        self,
        size: tuple[int, int],
        config: PreTrainedConfig,
        settings: Mapping[str, Any],  # noqa: ARG002 - the config says it
    ) -> VisionCall:
        """The picture whole and in tiles; see `Family.picture_call`."""
        features = clip_features(config)
        rows, columns = tile_grid(size, config.image_grid_pinpoints, features.image_size)
        grid = (features.side, features.side)
        return VisionCall(1 + rows * columns, grid, int(_pack(size, config).shape[0]))

    def prompt_builder(self, processor: Path, config: PreTrainedConfig) -> ChatPrompts:
        """Prompt builder from a directory with tokenizer and image processor files."""
        return LlavaNextPrompts(processor, config)

    def vision_feeds(self, picture: Picture, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:
        """Inputs of `vision_encoder.onnx` for one picture, in the stem's order.

        Returns:
            `pixel_values` [tiles, 3, image_size, image_size] float32; `pack_index` [N] int64, see
            `ep_export.families.tiles.pack_index`.
        """
        return {"pixel_values": picture.pixel_values, "pack_index": _pack(picture.size, config)}

    def _reference_pictures(
        self,
        pictures: Sequence[Picture],
        config: PreTrainedConfig,  # noqa: ARG002
    ) -> dict[str, NDArray[Any]]:
        """All pictures together: those of fewer tiles are filled up, the model drops the filling again."""
        first = pictures[0].pixel_values
        most = max(picture.pixel_values.shape[0] for picture in pictures)
        pixels = np.zeros((len(pictures), most, *first.shape[1:]), dtype=first.dtype)
        for i, picture in enumerate(pictures):
            pixels[i, : picture.pixel_values.shape[0]] = picture.pixel_values
        sizes = np.array([(height, width) for width, height in (p.size for p in pictures)], dtype=np.int64)
        return {"pixel_values": pixels, "image_sizes": sizes}

    def patches_per_token(self, config: PreTrainedConfig) -> None:  # noqa: ARG002
        """Tokens of tiles have newlines between them; see `Family.patches_per_token`."""
        return

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""
        from ep_export.families.llava_next_vision import TilePacker, TileStem

        parts: Any = model.model
        plain = super().vision(model)
        tile = clip_features(model.config).image_size
        size = (2 * tile, tile)
        tiles = 1 + int(np.prod(tile_grid(size, model.config.image_grid_pinpoints, tile)))
        return VisionTrace(
            stem=TileStem(plain.stem),
            blocks=plain.blocks,
            kinds=plain.kinds,
            merger=TilePacker(plain.merger, parts.image_newline),
            carry_names=("pack_index",),
            example_feeds={
                "pixel_values": np.zeros((tiles, 3, tile, tile), dtype=np.float32),
                "pack_index": _pack(size, model.config),
            },
            dynamic_axes={"pixel_values": {0: "tiles"}, "pack_index": {0: "N"}},
        )


def _pack(size: tuple[int, int], config: PreTrainedConfig) -> NDArray[np.int64]:
    features = clip_features(config)
    tiles = tile_grid(size, config.image_grid_pinpoints, features.image_size)
    return pack_index(size, tiles, features.side)


def refuse_uneven_tiles(config: PreTrainedConfig, tile: int) -> None:
    """Stop where pictures cannot be cut into tiles of `tile` pixels.

    Raises:
        UserError: Names the resolution.
    """
    resolutions = checked_resolutions(config.image_grid_pinpoints, "config")
    uneven = [each for each in resolutions if each[0] % tile or each[1] % tile]
    if uneven:
        raise UserError(
            f"config fits pictures into {uneven[0]}, which is no multiple of its tiles of {tile} pixels",
            hint="check config.json",
        )

"""Pictures, videos and a question as LLaVA-OneVision's arrays; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.families.base import Picture, Video, Visual
from ep_export.families.chat_prompts import ChatPrompts, Parts
from ep_export.families.clip_features import siglip_features
from ep_export.families.llava_onevision_tiles import pack_frame, pack_picture, pack_whole
from ep_export.families.processor_files import load_image_processor, prepare
from ep_export.families.tiles import tile_grid, tile_resolutions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["LlavaOnevisionPrompts", "most_tiles"]


def most_tiles(config: PreTrainedConfig) -> int:
    """Tiles whose features may stand in a prompt before they are scaled down.

    Raises:
        UserError: The config packs features another way.
    """
    kind, _, count = config.vision_aspect_ratio.rpartition("_")
    if kind != "anyres_max" or not count.isdecimal() or not int(count):
        raise UserError(
            f"config has vision_aspect_ratio {config.vision_aspect_ratio!r}, expected e.g. 'anyres_max_9'",
            hint="check config.json",
        )
    return int(count)


class LlavaOnevisionPrompts(ChatPrompts):
    """The prompt builder; see `ep_export.families.chat_prompts.ChatPrompts`.

    Frames of a video go through Pillow's bicubic filter, like pictures; Hugging Face's video processor uses
    torchvision's, which rounds differently in the last of 8 bits.
    """

    def __init__(self, processor: Path, config: PreTrainedConfig) -> None:
        """Load tokenizer, chat template and image processor from a local directory.

        Raises:
            UserError: A file is missing or unusable, or it cuts pictures another way than the model expects.
        """
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        super().__init__(processor, config, image_processor=LlavaOnevisionImageProcessorPil)
        self._whole_frames = load_image_processor(processor, SiglipImageProcessorPil)
        self._features = siglip_features(config)
        self._most = most_tiles(config)
        self._alone = True
        self._resolutions = tile_resolutions(processor, config, self._images)

    def _groups(self, visuals: Sequence[Visual]) -> tuple[Parts, ...]:
        """As the base's; Hugging Face cuts a picture into tiles only where it is alone in its prompt."""
        pictures = sum(not isinstance(visual, Video) for visual in visuals)
        maker = copy(self)  # this object is shared between prompts and stays as it is
        maker._alone = pictures == 1  # noqa: SLF001 - its own
        return ChatPrompts._groups(maker, visuals)  # noqa: SLF001 - the base's

    def _process(self, pixels: NDArray[np.uint8]) -> Picture:
        images = [pixels] if self._alone else [pixels, pixels[:1, :1]]  # two are several: the first is taken
        made = prepare(self._images, [images])
        side = self._features.side
        size = (pixels.shape[1], pixels.shape[0])
        tiles = tile_grid(size, self._resolutions, self._features.image_size) if self._alone else (0, 0)
        values = self._checked(made["pixel_values"][0], 1 + tiles[0] * tiles[1])
        if not self._alone:
            whole = pack_whole(side)
            return Picture(
                values, (1, side, side), whole.token_grid, size, whole.cells, view=_padded_square(*size)
            )
        packing = pack_picture(size, tiles, side, self._most)
        grid = (1, tiles[0] * side, tiles[1] * side)
        return Picture(values, grid, packing.token_grid, size, packing.cells)

    def _process_video(self, video: Video) -> Parts:
        frames = self._frames(video)
        side, size = self._features.side, (frames.shape[2], frames.shape[1])
        made = prepare(self._whole_frames, list(frames))
        values = self._checked(made["pixel_values"], len(frames))
        parts = []
        for i in range(len(frames)):
            packing = pack_frame(side, last=i == len(frames) - 1)
            parts.append(
                Picture(
                    pixel_values=values[i : i + 1],
                    grid=(1, side, side),
                    token_grid=packing.token_grid,
                    size=size,
                    cells=packing.cells,
                    seconds=1 / video.fps,
                )
            )
        return tuple(parts)

    def _checked(self, made: NDArray[np.float32], tiles: int) -> NDArray[np.float32]:
        values = np.ascontiguousarray(made, dtype=np.float32)
        tile = self._features.image_size
        if values.shape != (tiles, 3, tile, tile):
            raise UserError(
                f"the image processor makes tiles of shape {list(values.shape)}, expected "
                f"{[tiles, 3, tile, tile]}",
                hint="copy preprocessor_config.json from the checkpoint again",
            )
        return values


def _padded_square(width: int, height: int) -> tuple[int, int, int, int]:
    """The square around the middle that a picture is padded to when it is not cut into tiles."""
    side = max(width, height)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return left, top, left + side, top + side

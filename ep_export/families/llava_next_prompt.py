"""Pictures and a question as LLaVA-NeXT's arrays; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.families.base import Picture
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import clip_features
from ep_export.families.processor_files import prepare
from ep_export.families.tiles import pack_index, tile_grid, tile_resolutions, token_cells

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["LlavaNextPrompts"]


class LlavaNextPrompts(ChatPrompts):
    """The prompt builder; see `ep_export.families.chat_prompts.ChatPrompts`."""

    def __init__(self, processor: Path, config: PreTrainedConfig) -> None:
        """Load tokenizer, chat template and image processor from a local directory.

        Raises:
            UserError: A file is missing or unusable, or it cuts pictures another way than the model expects.
        """
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        super().__init__(processor, config, image_processor=LlavaNextImageProcessorPil)
        self._features = clip_features(config)
        self._resolutions = tile_resolutions(processor, config, self._images)

    def _process(self, pixels: NDArray[np.uint8]) -> Picture:
        made = prepare(self._images, [pixels])
        values = np.ascontiguousarray(made["pixel_values"][0], dtype=np.float32)
        side, tile = self._features.side, self._features.image_size
        size = (pixels.shape[1], pixels.shape[0])
        rows, columns = tile_grid(size, self._resolutions, tile)
        expected = (1 + rows * columns, 3, tile, tile)
        if values.shape != expected:
            raise UserError(
                f"the image processor makes tiles of shape {list(values.shape)}, expected {list(expected)}",
                hint="copy preprocessor_config.json from the checkpoint again",
            )
        token_grid, cells = token_cells(pack_index(size, (rows, columns), side), side)
        return Picture(
            pixel_values=values,
            grid=(1, rows * side, columns * side),
            token_grid=token_grid,
            size=size,
            cells=cells,
        )

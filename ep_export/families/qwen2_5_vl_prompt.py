"""Pictures and a question as Qwen2.5-VL's arrays; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ep_export.families.base import Picture
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.mrope import mrope_positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Qwen2_5_VLPrompts"]


class Qwen2_5_VLPrompts(ChatPrompts):  # noqa: N801 - the model's name
    """The prompt builder; see `ep_export.families.chat_prompts.ChatPrompts`."""

    def __init__(self, processor: Path, config: PreTrainedConfig) -> None:
        """Load tokenizer, chat template and image processor from a local directory.

        Raises:
            UserError: A file is missing or unusable.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        super().__init__(processor, config, image_processor=Qwen2VLImageProcessorPil)

    def _process(self, pixels: NDArray[np.uint8]) -> Picture:
        # The channel axis is named: a picture three pixels high must not be taken for channels first.
        made = self._images(images=[pixels], input_data_format="channels_last")
        time, rows, columns = (int(n) for n in made["image_grid_thw"][0])
        merge = int(self._images.merge_size)
        return Picture(
            pixel_values=np.ascontiguousarray(made["pixel_values"], dtype=np.float32),
            grid=(time, rows, columns),
            token_grid=(rows // merge, columns // merge),
            size=(pixels.shape[1], pixels.shape[0]),
        )

    def _positions(
        self, input_ids: NDArray[np.int64], pictures: Sequence[Picture]
    ) -> tuple[NDArray[np.int64], int]:
        return mrope_positions(input_ids, self._image_id, [p.token_grid for p in pictures])

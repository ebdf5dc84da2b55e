"""Pictures and a question as LLaVA-1.5's arrays; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError, near_matches
from ep_export.families.base import Picture
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import clip_features
from ep_export.families.processor_files import image_settings, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["LlavaPrompts"]


class LlavaPrompts(ChatPrompts):
    """The prompt builder; see `ep_export.families.chat_prompts.ChatPrompts`."""

    def __init__(self, processor: Path, config: PreTrainedConfig) -> None:
        """Load tokenizer, chat template and image processor from a local directory.

        Raises:
            UserError: A file is missing or unusable.
        """
        super().__init__(processor, config, image_processor=_image_processor(processor))
        self._features = clip_features(config)

    def _process(self, pixels: NDArray[np.uint8]) -> Picture:
        return self._square(pixels, with_class=self._features.with_class)

    def _square(self, pixels: NDArray[np.uint8], *, with_class: bool) -> Picture:
        """A picture as the one square that the tower takes, its class token a visual token or not."""
        made = prepare(self._images, [pixels])
        values = np.ascontiguousarray(made["pixel_values"], dtype=np.float32)
        side, size = self._features.side, self._features.image_size
        if values.shape != (1, 3, size, size):
            raise UserError(
                f"the image processor makes pictures of {values.shape[3]} x {values.shape[2]} pixels, the "
                f"model takes {size} x {size}",
                hint="copy preprocessor_config.json from the checkpoint again",
            )
        patches = np.arange(side * side, dtype=np.int64)
        return Picture(
            pixel_values=values,
            grid=(1, side, side),
            token_grid=(side, side),
            size=(pixels.shape[1], pixels.shape[0]),
            cells=np.concatenate([[-1], patches]) if with_class else None,
            view=self._view(pixels.shape[1], pixels.shape[0]),
        )

    def _view(self, width: int, height: int) -> tuple[int, int, int, int] | None:
        """The square that the image processor cuts out, or pads to, around the middle."""
        images = self._images
        padded = bool(getattr(images, "do_pad", False))
        short = images.size.shortest_edge
        if short is None or not (padded or images.do_center_crop):
            return None
        # A picture is scaled until its short side, or its padded square, has `short` pixels.
        scale = (max if padded else min)(width, height) / short
        side = images.crop_size.height if images.do_center_crop else short
        left, top = round((width - scale * side) / 2), round((height - scale * side) / 2)
        return left, top, left + round(scale * side), top + round(scale * side)


def _image_processor(processor: Path) -> Any:
    """The class that the checkpoint's files name: CLIP's crops to a square, LLaVA's own may pad to one.

    Video-LLaVA's does what CLIP's does, under a name of its own.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    known = {
        "CLIPImageProcessor": CLIPImageProcessorPil,
        "LlavaImageProcessor": LlavaImageProcessorPil,
        "VideoLlavaImageProcessor": CLIPImageProcessorPil,
    }
    settings = image_settings(processor)
    name = str(
        settings.get("image_processor_type", settings.get("feature_extractor_type", "CLIPImageProcessor"))
    )
    plain = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if plain not in known:
        raise UserError(
            f"{processor} names the image processor {name!r}, which is not supported",
            hint=near_matches(plain, known),
        )
    return known[plain]

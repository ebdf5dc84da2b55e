"""Hugging Face's processors where torchvision, which their video processors need, is absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["PillowVideos"]


class PillowVideos:
    """In the place of a video processor: every frame through an image processor that uses Pillow.

    Args:
        images: A `...Pil` image processor with the video processor's settings.
    """

    model_input_names = ("pixel_values_videos",)

    def __init__(self, images: Any) -> None:
        self.images = images
        self.valid_kwargs = images.valid_kwargs

    def __call__(self, videos: Sequence[Sequence[np.ndarray]], **_: Any) -> dict[str, torch.Tensor]:
        made = [self.images(images=[*video], return_tensors="pt")["pixel_values"] for video in videos]
        return {"pixel_values_videos": torch.stack(made)}

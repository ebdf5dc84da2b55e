"""Pictures scaled down to a number of pixels, before a family's own image processor sees them."""

from __future__ import annotations

import math

from PIL import Image

__all__ = ["scaled_picture", "scaled_size"]


def scaled_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """(width, height) of the same shape with at most so many pixels; as it is where it has no more."""
    shrink = min(1.0, math.sqrt(max_pixels / math.prod(size)))
    width, height = (max(1, int(side * shrink)) for side in size)
    return width, height


def scaled_picture(picture: Image.Image, max_pixels: int) -> Image.Image:
    """The picture in its `scaled_size`, by Pillow's Lanczos filter; the same object where that is its own."""
    size = scaled_size(picture.size, max_pixels)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)

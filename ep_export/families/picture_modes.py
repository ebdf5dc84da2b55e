"""Pictures of any PIL mode as plain RGB, the way a person sees them."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["to_rgb"]


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert to mode RGB.

    Transparent pixels are laid on white, as Qwen's own utilities do; dropping the alpha channel would show
    the arbitrary colours behind it. 16-bit greys are scaled to 8 bits; PIL's conversion would clip them to
    white.
    """
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.int64)
        deep = picture.mode != "I" or values.max() > 255
        return Image.fromarray(np.clip(values // 257 if deep else values, 0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if picture.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in picture.info:
        visible = picture.convert("RGBA")
        white = Image.new("RGBA", visible.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, visible).convert("RGB")
    return picture.convert("RGB")

"""Draw which patches of a picture a cut keeps: kept ones as they are, dropped ones grey and dim."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["captioned", "draw_kept"]

_LONG_SIDE = 1120
"""Pixels of the drawing's longer side: crisp on a phone at 3x and on a printed half page."""
_DIM = 0.30  # of the grey value that is left of a dropped patch
_TINT = np.array([16.0, 22.0, 34.0])  # what the rest of it is: a dark blue grey, so that black stays visible
_GRID = np.array([255.0, 255.0, 255.0])
_GRID_OPACITY = 0.13
_EDGE = np.array([255.0, 190.0, 60.0])  # border of a kept region


def draw_kept(
    image: Image.Image,
    token_grid: tuple[int, int],
    kept: NDArray[np.bool_],
    *,
    view: tuple[int, int, int, int] | None = None,
    caption: str = "",
) -> Image.Image:
    """The picture with the patches that go on in colour, the others dim and grey.

    A thin line separates patches, a bright one goes round what is kept.

    Args:
        image: The original picture, any mode and size.
        token_grid: (height, width) in cells.
        kept: [height * width] bool, row-major.
        view: (left, top, right, bottom) of what the grid lies on, in pixels; all of it when None, black where
            it reaches over the edge.
        caption: A line below the picture; none when empty.

    Returns:
        An RGB picture whose patches are whole pixels; its shape is the token grid's.

    Raises:
        ValueError: `kept` does not fit the grid.
    """
    from PIL import Image as Images
    from PIL import ImageOps

    rows, columns = token_grid
    if kept.shape != (rows * columns,) or kept.dtype != np.bool_:
        raise ValueError(f"kept is {kept.dtype} {kept.shape}, expected bool ({rows * columns},)")
    cell = max(8, _LONG_SIDE // max(rows, columns))
    size = (columns * cell, rows * cell)
    # the vision encoder saw the picture stretched to the grid, so it is drawn that way
    upright = ImageOps.exif_transpose(image).convert("RGB")
    seen = upright if view is None else upright.crop(view)
    scaled = seen.resize(size, Images.Resampling.LANCZOS)
    pixels = np.asarray(scaled, dtype=np.float64)
    mask = kept.reshape(rows, columns)
    inside = np.kron(mask, np.ones((cell, cell), dtype=bool))
    pixels = np.where(inside[..., None], pixels, _dimmed(pixels))
    pixels = _lines(pixels, mask, cell)
    drawing = Images.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))
    return captioned(drawing, caption) if caption else drawing


def _dimmed(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    dimmed: NDArray[np.float64] = grey[..., None] * _DIM + _TINT * (1 - _DIM)
    return dimmed


def _lines(pixels: NDArray[np.float64], mask: NDArray[np.bool_], cell: int) -> NDArray[np.float64]:
    """A faint grid over everything and a bright border inside every kept region."""
    drawn = pixels.copy()
    for axis in (0, 1):
        lines = np.arange(cell, drawn.shape[axis], cell)
        index = (lines, slice(None)) if axis == 0 else (slice(None), lines)
        drawn[index] = drawn[index] * (1 - _GRID_OPACITY) + _GRID * _GRID_OPACITY
    width = min(3, max(1, cell // 16))
    padded = np.pad(mask, 1)
    for row, column in np.argwhere(mask):
        top, left = row * cell, column * cell
        box = drawn[top : top + cell, left : left + cell]
        above, below = padded[row, column + 1], padded[row + 2, column + 1]
        before, after = padded[row + 1, column], padded[row + 1, column + 2]
        if not above:
            box[:width] = _EDGE
        if not below:
            box[-width:] = _EDGE
        if not before:
            box[:, :width] = _EDGE
        if not after:
            box[:, -width:] = _EDGE
    return drawn


def captioned(drawing: Image.Image, *lines: str) -> Image.Image:
    """A drawing with lines of text below it; long ones are broken, very long ones end in dots."""
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFont

    size = min(36, max(14, drawing.width // 40))
    font = ImageFont.load_default(size=size)
    broken = [part for line in lines for part in _broken(line, int(1.8 * drawing.width / size))]
    pitch = int(size * 1.5)
    page = Images.new("RGB", (drawing.width, drawing.height + pitch * len(broken) + size), (16, 22, 34))
    page.paste(drawing, (0, 0))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(broken):
        top = drawing.height + size / 2 + pitch * (number + 0.5)
        draw.text((size * 0.8, top), line, fill=(235, 238, 245), font=font, anchor="lm")
    return page


def _broken(text: str, characters: int) -> list[str]:
    """Text in at most three lines; with what the font cannot draw left out."""
    plain = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return textwrap.wrap(plain, max(8, characters), max_lines=3, placeholder=" ...")

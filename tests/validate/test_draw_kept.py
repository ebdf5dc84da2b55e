"""The drawing: kept patches as they are, dropped ones dim and grey."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_picture

from ep_export.validate.picture import draw_kept

GRID = (3, 4)
KEPT = np.array([1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], dtype=np.bool_)


def cells(drawing, grid):
    """[height, width, cell, cell, 3], without the lines at the borders of a cell."""
    pixels = np.asarray(drawing)
    cell = pixels.shape[0] // grid[0]
    assert pixels.shape == (grid[0] * cell, grid[1] * cell, 3)
    blocks = pixels.reshape(grid[0], cell, grid[1], cell, 3).swapaxes(1, 2)
    return blocks[:, :, 4:-4, 4:-4]


def test_kept_patches_show_the_picture_unchanged():
    picture = tiny_picture(112, 84)
    drawing = draw_kept(picture, GRID, KEPT)
    shown = cells(drawing, GRID)
    original = cells(picture.resize(drawing.size, Image.Resampling.LANCZOS), GRID)
    mask = KEPT.reshape(GRID)
    np.testing.assert_array_equal(shown[mask], original[mask])


def test_dropped_patches_are_dark_and_nearly_grey():
    shown = cells(draw_kept(tiny_picture(112, 84), GRID, KEPT), GRID)[~KEPT.reshape(GRID)].astype(int)
    assert shown.max() < 120
    assert (shown.max(axis=-1) - shown.min(axis=-1)).max() <= 15


def test_only_the_view_is_drawn_and_beyond_the_edge_is_black():
    picture = tiny_picture(200, 60)
    cropped = draw_kept(picture, GRID, KEPT, view=(60, 0, 140, 60))
    assert np.array_equal(
        np.asarray(cropped), np.asarray(draw_kept(picture.crop((60, 0, 140, 60)), GRID, KEPT))
    )
    padded = cells(draw_kept(picture, (3, 3), np.ones(9, dtype=np.bool_), view=(0, -60, 180, 120)), (3, 3))
    assert padded[[0, 2]].mean() < 1  # the resampling rings over the edge
    assert padded[1].mean() > 20


def test_every_mode_of_picture_is_drawn():
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        assert draw_kept(tiny_picture(50, 40).convert(mode), GRID, KEPT).mode == "RGB"


def test_a_caption_adds_a_band_below():
    plain, captioned = (draw_kept(tiny_picture(50, 40), GRID, KEPT, caption=c) for c in ("", "3 of 12 kept"))
    assert captioned.width == plain.width
    assert captioned.height > plain.height
    np.testing.assert_array_equal(np.asarray(captioned)[: plain.height], np.asarray(plain))


@pytest.mark.parametrize("kept", [KEPT[:-1], KEPT.astype(np.int64), KEPT.reshape(GRID)])
def test_a_mask_that_does_not_fit_is_refused(kept):
    with pytest.raises(ValueError, match="expected bool"):
        draw_kept(tiny_picture(50, 40), GRID, kept)

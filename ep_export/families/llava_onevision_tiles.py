"""Which features every visual token of LLaVA-OneVision is made of; in NumPy.

As in `ep_export.families.tiles` a picture is seen whole and in tiles, but up to 36 of them: where their grid
is larger than a few tiles together, it is scaled down bilinearly to that size, and frames of a video are
halved likewise. A visual token is therefore a weighted sum of up to four features, or a newline. The host
says which and how much, so that the graph only gathers and adds, whatever the size of the picture. Equal to
`pack_image_features` and `apply_pooling` of Hugging Face.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_export.families.tiles import feature_grid, grid_cells

__all__ = ["Packing", "pack_frame", "pack_picture", "pack_whole", "tiled_grid"]

# The grid is left as it is up to this factor over the largest size, along a side; Hugging Face's number.
_TOLERATED = 1.1


@dataclass(frozen=True)
class Packing:
    """How the visual tokens of one picture or frame are made.

    Attributes:
        index: [N, 4] int64, rows of the feature table; one past the last is the newline.
        weight: [N, 4] float32, how much of each; a row sums to 1.
        token_grid: (height, width) of the cells that the tokens stand for.
        cells: [N] int64, see `ep_export.families.base.Picture`.
    """

    index: NDArray[np.int64]
    weight: NDArray[np.float32]
    token_grid: tuple[int, int]
    cells: NDArray[np.int64]


def tiled_grid(size: tuple[int, int], tiles: tuple[int, int], side: int, most: int) -> tuple[int, int]:
    """Height and width of what the tiles become.

    Args:
        size: (width, height) of the picture in pixels.
        tiles: Rows and columns of tiles, see `ep_export.families.tiles.tile_grid`.
        side: Patches along a tile's side.
        most: Tiles whose features the grid may hold before it is scaled down.
    """
    height, width = feature_grid(size, tiles, side).shape
    ratio = math.sqrt(height * width / (most * side**2))
    if ratio > _TOLERATED:
        return int(height // ratio), int(width // ratio)
    return height, width


def pack_picture(size: tuple[int, int], tiles: tuple[int, int], side: int, most: int) -> Packing:
    """A picture that is alone in its prompt: whole, then its tiles' grid, each row with a newline behind.

    Args:
        size: (width, height) of the picture in pixels.
        tiles: Rows and columns of tiles, see `ep_export.families.tiles.tile_grid`.
        side: Patches along a tile's side.
        most: See `tiled_grid`.
    """
    height, width = tiled_grid(size, tiles, side, most)
    index, weight = _resized(feature_grid(size, tiles, side), height, width)
    newline = side * side * (1 + tiles[0] * tiles[1])
    rows, shares = _single(np.full((height, 1), newline))
    index = np.concatenate([index, rows], axis=1).reshape(-1, 4)
    weight = np.concatenate([weight, shares], axis=1).reshape(-1, 4)
    whole, full = _single(np.arange(side * side))
    token_grid, cells = grid_cells(height, width, side)
    return Packing(np.concatenate([whole, index]), np.concatenate([full, weight]), token_grid, cells)


def pack_whole(side: int) -> Packing:
    """One of several pictures: whole, with one newline behind.

    Args:
        side: Patches along a side.
    """
    index, weight = _single(np.arange(side * side + 1))
    return Packing(index, weight, (side, side), _before_newline(side * side))


def pack_frame(side: int, *, last: bool) -> Packing:
    """A frame of a video: half as many tokens along a side, rounded up; the video's last has a newline.

    Args:
        side: Patches along a side.
        last: Whether it is the last frame.
    """
    half = math.ceil(side / 2)
    index, weight = _resized(np.arange(side * side).reshape(side, side), half, half)
    index, weight = index.reshape(-1, 4), weight.reshape(-1, 4)
    if not last:
        return Packing(index, weight, (half, half), np.arange(half * half))
    newline, share = _single(np.array([side * side]))
    return Packing(
        np.concatenate([index, newline]),
        np.concatenate([weight, share]),
        (half, half),
        _before_newline(half * half),
    )


def _before_newline(patches: int) -> NDArray[np.int64]:
    return np.concatenate([np.arange(patches), [-1]]).astype(np.int64)


def _single(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """[..., 4] index and weight of tokens that are one row of the table each."""
    weight = np.zeros((*rows.shape, 4), dtype=np.float32)
    weight[..., 0] = 1
    return np.repeat(rows[..., None], 4, axis=-1).astype(np.int64), weight


def _resized(
    grid: NDArray[np.int64], height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """[height, width, 4] index and weight of a grid of rows, scaled bilinearly."""
    if (height, width) == grid.shape:
        return _single(grid)
    above, below, down = _along(grid.shape[0], height)
    left, right, across = _along(grid.shape[1], width)
    corners = [grid[np.ix_(rows, columns)] for rows in (above, below) for columns in (left, right)]
    shares = [np.outer(rows, columns) for rows in (1 - down, down) for columns in (1 - across, across)]
    return np.stack(corners, axis=-1), np.stack(shares, axis=-1).astype(np.float32)


def _along(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Bilinear scaling of one axis, pixel centres aligned: two sources, and the share of the second."""
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    first = np.minimum(at.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), at - first

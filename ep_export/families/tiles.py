"""Pictures of any shape as square tiles: how many, and which features become visual tokens; in NumPy.

A picture is fitted into the best of a few resolutions, padded, and cut into tiles; the whole picture,
squeezed into one more tile, stands in front. Behind the vision tower the features of the tiles are laid out
as one grid, what only saw padding is cut off, and every row ends in a learned newline. The host says which
feature stands where, so that the graph only gathers. Equal to `pack_image_features` of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack_index", "tile_grid", "token_cells"]


def tile_grid(size: tuple[int, int], resolutions: Sequence[Sequence[int]], tile: int) -> tuple[int, int]:
    """Rows and columns of tiles, the one of the whole picture not counted.

    Args:
        size: (width, height) of the picture in pixels.
        resolutions: (height, width) of what it may be fitted into.
        tile: Side of a tile in pixels.
    """
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    rows, columns = select_best_resolution((height, width), [tuple(each) for each in resolutions])
    return rows // tile, columns // tile


def pack_index(size: tuple[int, int], tiles: tuple[int, int], side: int) -> NDArray[np.int64]:
    """Which row of the feature table every visual token is.

    Args:
        size: (width, height) of the picture in pixels.
        tiles: Rows and columns of tiles, see `tile_grid`.
        side: Patches along a tile's side.

    Returns:
        [N] int64: side * side rows a tile, the whole picture's first; one past the last is the newline.
    """
    rows, columns = tiles
    per_tile = side * side
    whole = np.arange(per_tile)
    grid = per_tile + np.arange(rows * columns * per_tile).reshape(rows, columns, side, side)
    grid = _unpad(grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side), size)
    newline = np.full((grid.shape[0], 1), per_tile * (1 + rows * columns))
    return np.concatenate([whole, np.hstack([grid, newline]).ravel()]).astype(np.int64)


def token_cells(index: NDArray[np.int64], side: int) -> tuple[tuple[int, int], NDArray[np.int64]]:
    """Where in the picture every visual token looks.

    Args:
        index: From `pack_index`.
        side: Patches along a tile's side.

    Returns:
        (height, width) of the tiles' patches without padding, and [N] int64, the row-major cell of every
        token; -1 for newlines and for the picture seen whole. Where padding leaves no patch of the tiles, the
        picture seen whole is the grid.
    """
    whole = side * side
    tiled = index[whole:]
    newlines = tiled == tiled.max(initial=0)  # every row ends in one, the last included
    height, patches = int(newlines.sum()), int((~newlines).sum())
    if not patches:
        cells = np.concatenate([np.arange(whole), np.full(height, -1)])
        return (side, side), cells.astype(np.int64)
    cells = np.concatenate([np.full(whole, -1), np.where(newlines, -1, np.cumsum(~newlines) - 1)])
    return (height, patches // height), cells.astype(np.int64)


def _unpad(grid: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Cut off equally much on both sides of the padded axis; Hugging Face's rounding, digit for digit."""
    width, height = size
    rows, columns = grid.shape
    if width / height > columns / rows:
        inside = int(round(height * (columns / width), 7))  # 2.99999999 is 3, 2.9 is 2
        padding = (rows - inside) // 2
        return grid[padding : rows - padding]
    inside = int(round(width * (rows / height), 7))
    padding = (columns - inside) // 2
    return grid[:, padding : columns - padding]

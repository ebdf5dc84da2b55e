"""Pictures of any shape as square tiles: how many, and which features become visual tokens; in NumPy.

A picture is fitted into the best of a few resolutions, padded, and cut into tiles; the whole picture,
squeezed into one more tile, stands in front. Behind the vision tower the features of the tiles are laid out
as one grid, what only saw padding is cut off, and every row ends in a learned newline. The host says which
feature stands where, so that the graph only gathers. Equal to `pack_image_features` of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "checked_resolutions",
    "feature_grid",
    "grid_cells",
    "pack_index",
    "tile_grid",
    "tile_resolutions",
    "token_cells",
]

# Along a side: nearly twice the 2304 of LLaVA-OneVision, the largest published.
_MOST_PIXELS = 4096


def checked_resolutions(pairs: Any, where: str) -> list[list[int]]:
    """What pictures may be fitted into, (height, width) each, as a file has it.

    Args:
        pairs: Its image_grid_pinpoints.
        where: What errors call the file.

    Raises:
        UserError: They are none, or no sizes of a picture.
    """
    if not isinstance(pairs, (list, tuple)) or not pairs or not all(_is_size(pair) for pair in pairs):
        raise UserError(
            f"{where} has image_grid_pinpoints {pairs!r}, expected pairs of a height and a width, "
            f"1 to {_MOST_PIXELS} pixels each",
            hint="copy the file from the checkpoint again",
        )
    return [list(pair) for pair in pairs]


def _is_size(pair: Any) -> bool:
    return (
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(type(side) is int and 0 < side <= _MOST_PIXELS for side in pair)
    )


def tile_resolutions(processor: Path, config: PreTrainedConfig, images: Any) -> list[list[int]]:
    """What pictures may be fitted into, (height, width) each, on which model and image processor must agree.

    Args:
        processor: The directory the image processor was loaded from.
        config: The model's config.
        images: The image processor.

    Raises:
        UserError: They do not agree.
    """
    expected = checked_resolutions(config.image_grid_pinpoints, "config")
    found = checked_resolutions(images.image_grid_pinpoints, f"preprocessor_config.json in {processor}")
    if found != expected:
        raise UserError(
            f"preprocessor_config.json in {processor} fits pictures into {found}, the model's config "
            f"into {expected}",
            hint="copy both files from the checkpoint again",
        )
    return expected


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


def feature_grid(size: tuple[int, int], tiles: tuple[int, int], side: int) -> NDArray[np.int64]:
    """The features of all tiles as one grid over the picture, without what only saw padding.

    Args:
        size: (width, height) of the picture in pixels.
        tiles: Rows and columns of tiles, see `tile_grid`.
        side: Patches along a tile's side.

    Returns:
        [height, width] int64, rows of the feature table: side * side rows a tile, the whole picture's first.
    """
    rows, columns = tiles
    per_tile = side * side
    grid = per_tile + np.arange(rows * columns * per_tile).reshape(rows, columns, side, side)
    return _unpad(grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side), size)


def pack_index(size: tuple[int, int], tiles: tuple[int, int], side: int) -> NDArray[np.int64]:
    """Which row of the feature table every visual token is; arguments as `feature_grid`.

    Returns:
        [N] int64: the whole picture's rows, then those of the tiles' grid, a newline behind each of its rows;
        one past the last row of the table is the newline.
    """
    grid = feature_grid(size, tiles, side)
    newline = np.full((grid.shape[0], 1), side * side * (1 + tiles[0] * tiles[1]))
    return np.concatenate([np.arange(side * side), np.hstack([grid, newline]).ravel()]).astype(np.int64)


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
    return grid_cells(height, patches // max(1, height), side)


def grid_cells(height: int, width: int, side: int) -> tuple[tuple[int, int], NDArray[np.int64]]:
    """As `token_cells`, from the size of the tiles' grid.

    Args:
        height: Rows of the grid, each of which ends in a newline.
        width: Features in a row.
        side: Patches along a tile's side.
    """
    whole = side * side
    if not height * width:
        return (side, side), np.concatenate([np.arange(whole), np.full(height, -1)]).astype(np.int64)
    grid = np.arange(height * width).reshape(height, width)
    rows = np.hstack([grid, np.full((height, 1), -1)])
    return (height, width), np.concatenate([np.full(whole, -1), rows.ravel()]).astype(np.int64)


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

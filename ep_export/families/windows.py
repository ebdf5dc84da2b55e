"""Window attention layout of Qwen2.5-VL's vision encoder, computed on the host in NumPy.

Patches stand in the order of the image processor: merge blocks row by row, the patches of a block together. A
window covers side x side merge blocks; windows on the right and lower edge are smaller. For batched attention
every window gets the same number of slots, and those without a patch are marked.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["PADDING", "patch_positions", "window_layout", "window_patches"]

PADDING = -1
"""Marks a slot without a patch in `window_index`."""


def window_patches(window_size: int, patch_size: int, merge_size: int) -> int:
    """T: slots of a window, from the sides in pixels."""
    return (window_size // merge_size // patch_size * merge_size) ** 2


def window_layout(
    height: int, width: int, *, side: int, merge_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which patch stands in which slot of which window.

    Args:
        height: Rows of patches, a multiple of `merge_size`.
        width: Columns of patches, a multiple of `merge_size`.
        side: Merge blocks along a window's side.
        merge_size: Patches along a merge block's side.

    Returns:
        `window_index` [W, T]: the patch in every slot, or `PADDING`; `window_inverse` [P]: the slot, counted
        over all windows, of every patch.
    """
    rows, columns = height // merge_size, width // merge_size
    down, across = -(-rows // side), -(-columns // side)
    blocks = np.full((down * side, across * side), PADDING, dtype=np.int64)
    blocks[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    by_window = (
        blocks.reshape(down, side, across, side).transpose(0, 2, 1, 3).reshape(down * across, side * side, 1)
    )
    unit = merge_size * merge_size
    index = np.where(by_window < 0, PADDING, by_window * unit + np.arange(unit)).reshape(down * across, -1)
    slots = np.flatnonzero(index.reshape(-1) >= 0)
    inverse = np.empty(height * width, dtype=np.int64)
    inverse[index.reshape(-1)[slots]] = slots
    return index, inverse


def patch_positions(height: int, width: int, *, merge_size: int) -> NDArray[np.int64]:
    """Row and column of every patch, [P, 2], in the image processor's order."""
    blocked = (height // merge_size, merge_size, width // merge_size, merge_size)
    grid = np.indices((height, width), dtype=np.int64).reshape(2, *blocked)
    return np.ascontiguousarray(grid.transpose(1, 3, 2, 4, 0).reshape(height * width, 2))

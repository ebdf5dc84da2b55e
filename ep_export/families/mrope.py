"""Three-axis rotary positions of Qwen's vision-language models, in NumPy.

Text counts 0, 1, 2, ... on all three axes (time, height, width). A picture's tokens share one time position
and carry their row and column; the text after it continues one past the largest position used so far, so that
a picture of h x w tokens advances the count by max(h, w) only. Equal to `get_rope_index` of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["mrope_positions"]


def mrope_positions(
    input_ids: NDArray[np.int64], image_token_id: int, token_grids: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.int64], int]:
    """Position ids of a prompt.

    Args:
        input_ids: [S] token ids in which every picture is one run of placeholders.
        image_token_id: The placeholder's id.
        token_grids: (height, width) of every picture in visual tokens, in prompt order.

    Returns:
        Position ids [3, S] and the position of the first generated token.

    Raises:
        ValueError: The runs of placeholders do not match the grids.
    """
    positions = np.empty((3, input_ids.shape[0]), dtype=np.int64)
    runs = _runs(input_ids == image_token_id)
    if [stop - start for start, stop in runs] != [height * width for height, width in token_grids]:
        raise ValueError(f"placeholder runs {runs} do not match the token grids {list(token_grids)}")
    current = done = 0
    for (start, stop), (height, width) in zip(runs, token_grids, strict=True):
        positions[:, done:start] = current + np.arange(start - done)
        current += start - done
        positions[0, start:stop] = current
        positions[1, start:stop] = current + np.repeat(np.arange(height), width)
        positions[2, start:stop] = current + np.tile(np.arange(width), height)
        current += max(height, width)
        done = stop
    positions[:, done:] = current + np.arange(input_ids.shape[0] - done)
    return positions, current + input_ids.shape[0] - done


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive true values."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]

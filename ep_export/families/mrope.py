"""Three-axis rotary positions of Qwen's vision-language models, in NumPy.

Text counts 0, 1, 2, ... on all three axes (time, height, width). A picture's tokens share one time position
and carry their row and column; those of a video count time too, in steps of their own. The text after it goes
on max(h, w) past where the picture of h x w tokens began, whatever time the video reached. Equal to
`get_rope_index` of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["VisualRun", "mrope_positions"]


@dataclass(frozen=True)
class VisualRun:
    """One run of placeholders: a picture, or a video.

    Attributes:
        times: Slices of time; 1 for a picture.
        height: Rows of visual tokens.
        width: Columns of visual tokens.
        interval: Time positions from one slice to the next; the fraction of every product is cut off.
    """

    times: int
    height: int
    width: int
    interval: float = 1.0

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return self.times * self.height * self.width


def mrope_positions(
    input_ids: NDArray[np.int64], placeholders: Sequence[int], runs: Sequence[VisualRun]
) -> tuple[NDArray[np.int64], int]:
    """Position ids of a prompt.

    Args:
        input_ids: [S] token ids in which every picture or video is one run of its placeholder.
        placeholders: The placeholders' ids.
        runs: The pictures and videos in prompt order.

    Returns:
        Position ids [3, S] and the position of the first generated token.

    Raises:
        ValueError: The runs of placeholders do not match `runs`.
    """
    positions = np.empty((3, input_ids.shape[0]), dtype=np.int64)
    found = _found(input_ids, placeholders)
    if [stop - start for start, stop in found] != [run.tokens for run in runs]:
        raise ValueError(f"placeholder runs {found} do not match {list(runs)}")
    current = done = 0
    for (start, stop), run in zip(found, runs, strict=True):
        positions[:, done:start] = current + np.arange(start - done)
        current += start - done
        times, rows, columns = np.indices((run.times, run.height, run.width)).reshape(3, -1)
        # Hugging Face multiplies in float32 and cuts off what is no integer.
        times = (times.astype(np.float32) * np.float32(run.interval)).astype(np.int64)
        positions[:, start:stop] = current + np.stack([times, rows, columns])
        current += max(run.height, run.width)
        done = stop
    positions[:, done:] = current + np.arange(input_ids.shape[0] - done)
    # A long video's time may be ahead of the text after it: answers go on past the largest position.
    return positions, int(positions.max(initial=-1)) + 1


def _found(input_ids: NDArray[np.int64], placeholders: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive equal placeholders."""
    marked = np.where(np.isin(input_ids, placeholders), input_ids, -1)
    edges = np.flatnonzero(np.diff(marked)) + 1
    bounds = [0, *edges.tolist(), input_ids.shape[0]]
    return [(start, stop) for start, stop in pairwise(bounds) if start < stop and marked[start] >= 0]

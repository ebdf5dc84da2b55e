"""What was kept, as people see it: cells of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_export.families.base import PromptInputs

__all__ = ["KeptPicture", "kept_pictures"]


@dataclass(frozen=True)
class KeptPicture:
    """What was kept of one picture, or of one part of a video.

    Attributes:
        token_grid: (height, width) in cells, one a visual token.
        kept_tokens: Row-major indices of the cells whose tokens reach the last span.
        view: What the grid lies on; see `ep_export.families.base.Picture`.
        video: Which video of the prompt this is a part of, counted from 0; None for a picture.
        kept_by_cut: For every cut of the schedule the cells whose tokens go on; the last is `kept_tokens`.
            Empty where nothing was to be pruned.
        picture: Its number among the pictures that were given; None where nobody numbers them.
    """

    token_grid: tuple[int, int]
    kept_tokens: tuple[int, ...]
    view: tuple[int, int, int, int] | None = None
    video: int | None = None
    kept_by_cut: tuple[tuple[int, ...], ...] = ()
    picture: int | None = None

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[height * width], true where a cell's token reaches the last span."""
        return self._mask(self.kept_tokens)

    @property
    def masks(self) -> tuple[NDArray[np.bool_], ...]:
        """`kept`, cut by cut; that alone where there was no cut."""
        return tuple(self._mask(cells) for cells in self.kept_by_cut or (self.kept_tokens,))

    def _mask(self, cells: tuple[int, ...]) -> NDArray[np.bool_]:
        mask = np.zeros(self.token_grid[0] * self.token_grid[1], dtype=np.bool_)
        mask[list(cells)] = True
        return mask


def kept_pictures(
    prompt: PromptInputs,
    kept_by_cut: Sequence[NDArray[np.int64]],
    *,
    numbers: Sequence[int] | None = None,
) -> tuple[KeptPicture, ...]:
    """Kept tokens by picture: which of the visual positions go on, divided at the pictures' ends.

    Args:
        prompt: The prompt.
        kept_by_cut: For every cut the prompt positions that go on; empty where everything is kept.
        numbers: `KeptPicture.picture` of every picture.
    """
    everything = np.ones(prompt.visual_index.shape, dtype=np.bool_)
    kept = [np.isin(prompt.visual_index, index) for index in kept_by_cut]
    shown, start = [], 0
    for place, picture in enumerate(prompt.pictures):
        tokens = slice(start, start + picture.visual_tokens)
        cells = [
            tuple(np.flatnonzero(picture.kept_cells(mask[tokens])).tolist()) for mask in kept or [everything]
        ]
        shown.append(
            KeptPicture(
                token_grid=picture.token_grid,
                kept_tokens=cells[-1],
                view=picture.view,
                video=picture.video,
                kept_by_cut=tuple(cells) if kept else (),
                picture=None if numbers is None else numbers[place],
            )
        )
        start = tokens.stop
    return tuple(shown)

"""A contact sheet: which patches of every part of a video the decoder keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ep_export.validate.picture import draw_kept

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.families.base import Video
    from ep_export.runtime import KeptPicture

__all__ = ["draw_kept_video"]

_GAP = 6
_LEAST_WIDTH = 160  # of one drawing: a dozen patches across are still told apart
_PAPER = (16, 22, 34)


def draw_kept_video(video: Video, parts: Sequence[KeptPicture], *, cut: int = -1) -> Image.Image:
    """One drawing a part, row by row; see `draw_kept`.

    Args:
        video: What was shown.
        parts: What was kept of it, all its parts in order. Where a part stands for several frames, the first
            of them is drawn.
        cut: After which cut; the last one.
    """
    from PIL import Image as Images

    step = -(-len(video.frames) // len(parts))
    drawings = [
        draw_kept(video.frames[i * step], part.token_grid, part.masks[cut], view=part.view)
        for i, part in enumerate(parts)
    ]
    columns = math.ceil(math.sqrt(len(drawings)))
    rows = -(-len(drawings) // columns)
    first = drawings[0]
    width = max(_LEAST_WIDTH, first.width // columns)
    height = max(1, round(first.height * width / first.width))
    across, down = width + _GAP, height + _GAP
    sheet = Images.new("RGB", (columns * across - _GAP, rows * down - _GAP), _PAPER)
    for i, drawing in enumerate(drawings):
        small = drawing.resize((width, height), Images.Resampling.LANCZOS)
        sheet.paste(small, (i % columns * across, i // columns * down))
    return sheet

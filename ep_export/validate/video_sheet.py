"""A contact sheet: which patches of every part of a video the decoder keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ep_export.validate.picture import captioned, draw_kept

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
    drawings = [
        captioned(drawing.resize((width, height), Images.Resampling.LANCZOS), _frames(i * step, step, video))
        for i, drawing in enumerate(drawings)
    ]
    across, down = width + _GAP, drawings[0].height + _GAP
    sheet = Images.new("RGB", (columns * across - _GAP, rows * down - _GAP), _PAPER)
    for i, drawing in enumerate(drawings):
        sheet.paste(drawing, (i % columns * across, i // columns * down))
    return sheet


def _frames(first: int, count: int, video: Video) -> str:
    """Which of the frames that were shown a part stands for, from 1."""
    last = min(first + count, len(video.frames))
    return f"frame {first + 1}" if last == first + 1 else f"frames {first + 1} to {last}"

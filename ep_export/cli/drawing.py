"""What an answer kept of its pictures and videos, as one sheet: a row each, a column a cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.families.base import Visual
    from ep_export.runtime import Generation, KeptPicture

__all__ = ["draw_answer"]

_GAP = 12
_PAPER = (16, 22, 34)


def draw_answer(visuals: Sequence[Visual], question: str, answer: Generation) -> Image.Image:
    """Draw every picture and video of a prompt at every cut.

    Args:
        visuals: In prompt order.
        question: What was asked of them.
        answer: Says what was kept of each; with a picture or video there is a cut.
    """
    from ep_export.validate.picture import captioned

    captions = [f"from layer {cut.layer} on, {cut.policy}" for cut in answer.cuts]
    several = len(captions) > 1
    rows = [
        [_draw(visual, parts, cut, caption if several else "") for cut, caption in enumerate(captions)]
        for visual, parts in zip(visuals, _parts(visuals, answer.pictures), strict=True)
    ]
    kept = answer.visual_tokens - answer.prompt_tokens + len(answer.kept_index)
    return captioned(
        _sheet(rows),
        f"Q: {question}",
        f"A: {answer.answer}",
        f"{kept} of {answer.visual_tokens} visual tokens reach the last layer",
    )


def _parts(visuals: Sequence[Visual], pictures: Sequence[KeptPicture]) -> list[list[KeptPicture]]:
    """What belongs to every visual: a picture's one call of the vision encoder, a video's several."""
    from ep_export.families.base import Video

    alone = iter([picture for picture in pictures if picture.video is None])
    videos = iter(range(len(visuals)))
    grouped = []
    for visual in visuals:
        if isinstance(visual, Video):
            number = next(videos)
            grouped.append([picture for picture in pictures if picture.video == number])
        else:
            grouped.append([next(alone)])
    return grouped


def _draw(visual: Visual, parts: Sequence[KeptPicture], cut: int, caption: str) -> Image.Image:
    from ep_export.families.base import Video
    from ep_export.validate.picture import draw_kept
    from ep_export.validate.video_sheet import draw_kept_video

    if isinstance(visual, Video):
        return draw_kept_video(visual, parts, cut=cut)
    (part,) = parts
    return draw_kept(visual, part.token_grid, part.masks[cut], view=part.view, caption=caption)


def _sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Drawings beside and below each other; a lone one stays as it is."""
    from PIL import Image as Images

    if len(rows) == 1 and len(rows[0]) == 1:
        return rows[0][0]
    widths = [max(row[column].width for row in rows) for column in range(len(rows[0]))]
    heights = [max(drawing.height for drawing in row) for row in rows]
    size = (sum(widths) + _GAP * (len(widths) - 1), sum(heights) + _GAP * (len(heights) - 1))
    sheet = Images.new("RGB", size, _PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for drawing, width in zip(row, widths, strict=True):
            sheet.paste(drawing, (left, top))
            left += width + _GAP
        top += height + _GAP
    return sheet

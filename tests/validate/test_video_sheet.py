"""The contact sheet: one drawing a part of the video, of the frame it begins with."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ep_export.families.base import Video
from ep_export.runtime import KeptPicture
from ep_export.validate.video_sheet import draw_kept_video

COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (20, 250, 250)]


def video(frames):
    return Video(tuple(Image.new("RGB", (60, 40), colour) for colour in COLOURS[:frames]), 2.0)


def kept_everything(rows, columns):
    return KeptPicture((rows, columns), tuple(range(rows * columns)), video=0)


def places(sheet, columns, rows):
    """The colour in the middle of every place."""
    pixels = np.asarray(sheet.resize((columns * 30, rows * 30)))
    middle = pixels.reshape(rows, 30, columns, 30, 3)[:, 10:20, :, 10:20].mean((1, 3))
    return middle.reshape(-1, 3)


@pytest.mark.parametrize(
    ("frames", "parts", "shown"),
    [
        (5, [kept_everything(2, 3)] * 3, [0, 2, 4]),  # two frames a part
        (3, [kept_everything(2, 3)] * 3, [0, 1, 2]),
        (1, [kept_everything(2, 3)], [0]),
    ],
)
def test_every_part_shows_its_first_frame(frames, parts, shown):
    sheet = draw_kept_video(video(frames), parts)
    side = int(np.ceil(np.sqrt(len(shown))))
    made = places(sheet, side, -(-len(shown) // side))
    for place, number in zip(made, shown, strict=False):
        assert np.abs(place - COLOURS[number]).max() < 40


def test_what_is_dropped_is_dark():
    parts = [KeptPicture((2, 2), (), video=0), kept_everything(2, 2)]
    first, second = places(draw_kept_video(video(2), parts), 2, 1)
    assert first.max() < 120 < second.max()


def test_each_cut_has_a_sheet_of_its_own():
    part = KeptPicture((2, 2), (), video=0, kept_by_cut=((0, 1, 2, 3), ()))
    before, after = (places(draw_kept_video(video(1), [part], cut=cut), 1, 1)[0] for cut in (0, 1))
    assert after.max() < 120 < before.max()

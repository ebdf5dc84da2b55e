"""Videos as sampled frames: folders of pictures, animated pictures, video files. Files are not trusted.

Frames are taken evenly, the first of every equal share, as Hugging Face's video processors sample. A folder
needs Pillow alone; so does an animated GIF, WebP or PNG. Video files are decoded by PyAV, which is an extra:
a Jetson that answers about pictures does not need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ep_export.errors import UsageError, UserError, as_user_error
from ep_export.families.base import Video
from ep_export.families.picture_modes import to_rgb
from ep_export.runtime.pictures import SUFFIXES, open_picture, opened

__all__ = ["DEFAULT_FRAMES", "MOST_FRAMES", "open_video"]

DEFAULT_FRAMES = 8
"""Frames shown when nothing is asked for: what Video-LLaVA was trained with."""
MOST_FRAMES = 768
"""Frames shown at most: what Qwen's video processor allows."""

# A longer file is refused before it is decoded twice: an hour at 25 frames a second.
_MOST_SOURCE_FRAMES = 90_000
# Pixels of all frames shown: 1.5 GB as RGB. A frame alone is bounded as any picture is.
_MOST_PIXELS = 500_000_000
# Browsers show a frame whose duration is 0 this long.
_UNTIMED_SECONDS = 0.1
# Containers of video only: playlists and scripts, which FFmpeg would read too, may name other files.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"


def open_video(path: Path, *, frames: int | None = None, fps: float | None = None) -> Video:
    """Open a video and sample it evenly.

    Args:
        path: A folder whose pictures, sorted by name, are the frames; an animated picture; or a video file.
        frames: Frames to show at most; `DEFAULT_FRAMES` when neither this nor `fps` is given.
        fps: Frames a second to show, at most `MOST_FRAMES` in all. The pictures of a folder, which know no
            time, are taken to be 1 / fps apart, a second when it is not given.

    Returns:
        RGB frames, upright.

    Raises:
        UserError: Missing, damaged, too large, no video, or a video file without PyAV.
        UsageError: `frames` or `fps` is out of range.
    """
    if frames is not None and not 1 <= frames <= MOST_FRAMES:
        raise UsageError(f"frames is {frames}, expected 1 to {MOST_FRAMES}")
    if fps is not None and not 0 < fps < float("inf"):
        raise UsageError(f"fps is {fps:g}, expected a number above 0")
    if path.is_dir():
        return _folder(path, frames, fps)
    if not path.is_file():
        raise UserError(
            f"video {path} does not exist",
            hint="give a video file, an animated picture or a folder of frames",
        )
    if path.stat().st_size == 0:
        raise UserError(f"video {path} is empty", hint="give a video with content")
    return _animation(path, frames, fps) if _is_picture(path) else _video_file(path, frames, fps)


def _sample(count: int, seconds: float, frames: int | None, fps: float | None) -> list[int]:
    """Which of `count` frames, lasting `seconds` together, are shown."""
    wanted = count if fps is None else max(1, min(count, round(seconds * fps)))
    most = frames or (DEFAULT_FRAMES if fps is None else MOST_FRAMES)
    wanted = min(wanted, most)
    return [i * count // wanted for i in range(wanted)]


def _video(path: Path, shown: Iterable[Image.Image], count: int, seconds: float) -> Video:
    """Collect `count` frames that stand for `seconds`.

    Raises:
        UserError: They are too large together, or fewer.
    """
    kept: list[Image.Image] = []
    pixels = 0
    for frame in shown:
        pixels += frame.width * frame.height
        if pixels > _MOST_PIXELS:
            raise UserError(
                f"video {path} has frames of {frame.width} x {frame.height} pixels, {count} of them are over "
                f"{_MOST_PIXELS // 10**6} million",
                hint="show fewer frames, or scale the video down",
            )
        kept.append(frame)
    if len(kept) != count:
        raise UserError(f"video {path} is damaged: it ends early", hint="give an intact file")
    return Video(tuple(kept), count / seconds)


def _folder(path: Path, frames: int | None, fps: float | None) -> Video:
    files = sorted(
        file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise UserError(f"folder {path} holds no pictures", hint="give a folder with the frames of a video")
    seconds = len(files) / (fps or 1.0)
    chosen = _sample(len(files), seconds, frames, fps)
    return _video(path, (open_picture(files[i]) for i in chosen), len(chosen), seconds)


def _is_picture(path: Path) -> bool:
    """Whether its content is a picture's, or a damaged picture's: what is wrong is said where it is read."""
    try:
        with opened(path):
            return True
    except UserError as error:
        return not isinstance(error.__cause__, UnidentifiedImageError)


def _animation(path: Path, frames: int | None, fps: float | None) -> Video:
    with opened(path) as picture:
        count = getattr(picture, "n_frames", 1)
        if count < 2:
            raise UserError(f"{path} is a still picture, expected a video", hint=f"give it as --image {path}")
        _refuse_long(path, count)
        seconds = sum(_duration(frame) for frame in _each(picture, range(count)))
        chosen = _sample(count, seconds, frames, fps)
        upright = (to_rgb(ImageOps.exif_transpose(frame)) for frame in _each(picture, chosen))
        return _video(path, upright, len(chosen), seconds)


def _each(picture: Image.Image, numbers: Iterable[int]) -> Iterator[Image.Image]:
    """The same object at every frame; not to be kept."""
    for number in numbers:
        picture.seek(number)
        picture.load()  # WebP knows a frame's duration only then
        yield picture


def _duration(frame: Image.Image) -> float:
    milliseconds = frame.info.get("duration", 0)
    return milliseconds / 1000 if milliseconds else _UNTIMED_SECONDS


def _video_file(path: Path, frames: int | None, fps: float | None) -> Video:
    with _decoder(path) as container:
        count, seconds = _length(path, container)
    chosen = _sample(count, seconds, frames, fps)
    with _decoder(path) as container:
        return _video(path, _decoded(container, chosen), len(chosen), seconds)


def _length(path: Path, container: Any) -> tuple[int, float]:
    """Frames and seconds. Headers may be wrong about the first, so they are decoded and counted."""
    stream = container.streams.video[0]
    if stream.width * stream.height > (Image.MAX_IMAGE_PIXELS or _MOST_PIXELS):
        raise UserError(
            f"video {path} has frames of {stream.width} x {stream.height} pixels", hint="scale it down first"
        )
    _refuse_long(path, stream.frames)
    count = 0
    for count, _ in enumerate(container.decode(stream), 1):
        _refuse_long(path, count)
    if count == 0:
        raise UserError(f"video {path} has no frames", hint="give an intact file")
    rate = stream.average_rate or stream.guessed_rate
    seconds = count / float(rate) if rate else count * _UNTIMED_SECONDS
    return count, seconds


def _decoded(container: Any, chosen: Sequence[int]) -> Iterator[Image.Image]:
    wanted = set(chosen)
    for number, frame in enumerate(container.decode(container.streams.video[0])):
        if number in wanted:
            # The camera's note of how it was held; older PyAV does not read it.
            turn = getattr(frame, "rotation", 0)
            picture = frame.to_image()
            yield picture.rotate(turn, expand=True) if turn else picture
        if number == chosen[-1]:
            return


@contextmanager
def _decoder(path: Path) -> Iterator[Any]:
    """The opened file; errors of the decoder in one sentence.

    Raises:
        UserError: PyAV is not installed, or the file is no video or damaged.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{path} is no animated picture, and video files need PyAV, which is not installed",
            hint="pip install 'ep-export[video]', or give a folder of frames",
        ) from error
    # file: alone, so that nothing in the file can make FFmpeg open another one.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    hint = "give an intact MP4 or WebM file"
    with as_user_error(f"video {path} is damaged", hint=hint):
        try:
            with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
                if not container.streams.video:
                    raise UserError(f"{path} has no video in it", hint="give a video file")
                yield container
        except av.error.FFmpegError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{path} is no video PyAV can read: {reason}", hint=hint) from error


def _refuse_long(path: Path, count: int) -> None:
    if count > _MOST_SOURCE_FRAMES:
        raise UserError(
            f"video {path} has over {_MOST_SOURCE_FRAMES} frames", hint="cut it, or give a folder of frames"
        )

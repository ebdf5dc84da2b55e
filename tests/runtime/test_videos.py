"""Videos from folders, animations and files: which frames, how fast, and files nobody should trust."""

import struct
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_picture, tiny_video

from ep_export.errors import UsageError, UserError
from ep_export.runtime import open_video, videos

COUNT = 20
SOURCE = tiny_video(64, 48, COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames")
    for i, frame in enumerate(SOURCE.frames):
        frame.save(path / f"{i:03}.png")
    (path / "notes.txt").write_text("taken at noon")
    SOURCE.frames[0].save(path / ".hidden.png")
    return path


def animation(path, duration=100, frames=SOURCE.frames, **options):
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, **options)
    return path


def film(path, codec, rate=10):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in SOURCE.frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


def numbers(video):
    """Which frame of the source every frame is: the nearest one, as codecs lose a little."""
    source = np.stack([np.asarray(frame, dtype=np.float32) for frame in SOURCE.frames])
    return [int(np.abs(source - np.asarray(frame)).mean((1, 2, 3)).argmin()) for frame in video.frames]


EVENLY = [i * COUNT // 8 for i in range(8)]


@pytest.mark.parametrize(
    ("options", "expected", "fps"),
    [
        ({}, EVENLY, 0.4),
        ({"frames": 5}, [0, 4, 8, 12, 16], 0.25),
        ({"frames": 50}, list(range(COUNT)), 1.0),
        ({"fps": 2.0}, list(range(COUNT)), 2.0),
        ({"fps": 2.0, "frames": 4}, [0, 5, 10, 15], 0.4),
    ],
)
def test_a_folder_is_its_pictures_by_name(folder, options, expected, fps):
    made = open_video(folder, **options)
    assert numbers(made) == expected
    assert made.fps == pytest.approx(fps)
    assert all(np.array_equal(f, SOURCE.frames[i]) for f, i in zip(made.frames, expected, strict=True))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
@pytest.mark.parametrize(
    ("options", "expected", "fps"),
    [
        ({}, EVENLY, 4.0),
        ({"frames": 1}, [0], 0.5),
        ({"fps": 2.5}, [0, 4, 8, 12, 16], 2.5),
        ({"fps": 0.01}, [0], 0.5),
        ({"fps": 1000.0}, list(range(COUNT)), 10.0),
    ],
)
def test_an_animation_is_sampled_by_its_own_clock(tmp_path, suffix, options, expected, fps):
    made = open_video(animation(tmp_path / f"moving.{suffix}"), **options)
    assert numbers(made) == expected
    assert made.fps == pytest.approx(fps)
    assert {frame.mode for frame in made.frames} == {"RGB"}


def test_frames_of_an_animation_last_as_long_as_they_say(tmp_path):
    file = animation(tmp_path / "moving.webp", [100, 300, 600], SOURCE.frames[:3], lossless=True)
    assert open_video(file).fps == pytest.approx(3.0)


def test_frames_of_a_folder_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    SOURCE.frames[0].save(tmp_path / "0.png", exif=exif)
    assert open_video(tmp_path).frames[0].size == (48, 64)


@pytest.fixture
def pyav():
    return pytest.importorskip("av", reason="PyAV is not installed (pip install 'ep-export[video]')")


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx-vp9")])
def test_a_video_file_is_sampled_by_its_own_clock(pyav, tmp_path, suffix, codec):
    file = film(tmp_path / f"film.{suffix}", codec)
    assert numbers(open_video(file)) == EVENLY
    made = open_video(file, fps=2.0)
    assert (numbers(made), made.fps) == ([0, 5, 10, 15], 2.0)


def test_a_video_file_is_turned_upright(pyav, tmp_path):
    stored = film(tmp_path / "film.mp4", "mpeg4")
    raw = stored.read_bytes()
    at = raw.index(b"tkhd") + 4 + 4 + 20 + 16  # the matrix of version 0
    one = 1 << 16
    on_its_side = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(raw[:at] + on_its_side + raw[at + 36 :])
    upright = open_video(stored).frames[0].transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(open_video(tmp_path / "turned.mp4").frames[0], upright)


@pytest.mark.parametrize(
    "text",
    ["hello", "#EXTM3U\n#EXTINF:2,\nfilm.mp4\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile film.mp4\n"],
)
def test_text_and_lists_of_other_files_are_no_videos(pyav, tmp_path, text):
    film(tmp_path / "film.mp4", "mpeg4")
    (tmp_path / "list.m3u8").write_text(text)
    refused(tmp_path / "list.m3u8", "is no video PyAV can read")


def test_a_damaged_video_file_is_refused(pyav, tmp_path):
    file = film(tmp_path / "film.mp4", "mpeg4")
    file.write_bytes(file.read_bytes()[:3000])
    refused(file, "is no video PyAV can read")


def test_a_video_file_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    said = refused(tmp_path / "film.mp4", "need PyAV, which is not installed")
    assert "ep-export[video]" in said


def refused(path, said, **options):
    with pytest.raises(UserError, match=said) as caught:
        open_video(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.hint


def truncated(path):
    raw = animation(path).read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no pictures"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: tiny_picture(30, 30).save(path), "is a still picture"),
        (truncated, "is damaged"),
    ],
    ids=["missing", "empty folder", "empty", "still", "truncated"],
)
def test_bad_files_get_one_line_and_a_hint(tmp_path, make, said):
    make(tmp_path / "video.gif")
    assert refused(tmp_path / "video.gif", said)


def test_a_picture_in_a_folder_that_cannot_be_read_is_named(tmp_path):
    tiny_picture(30, 30).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("hello")
    with pytest.raises(UserError, match=r"1\.png is not a picture"):
        open_video(tmp_path)


def test_too_much_is_refused(folder, tmp_path, monkeypatch):
    file = animation(tmp_path / "moving.gif")
    monkeypatch.setattr(videos, "_MOST_PIXELS", 5 * 64 * 48)
    assert len(open_video(folder, frames=5).frames) == 5
    assert refused(folder, "frames of 64 x 48 pixels, 6 of them are over", frames=6)
    monkeypatch.setattr(videos, "_MOST_SOURCE_FRAMES", COUNT - 1)
    assert refused(file, "has over 19 frames", frames=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert refused(file, "is too large", frames=1)


@pytest.mark.parametrize("options", [{"frames": 0}, {"frames": 769}, {"fps": 0.0}, {"fps": float("inf")}])
def test_impossible_wishes_are_refused(folder, options):
    with pytest.raises(UsageError, match="expected"):
        open_video(folder, **options)

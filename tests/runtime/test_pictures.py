"""Picture files nobody should trust."""

import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin
from tiny import tiny_picture

from ep_export.errors import UserError
from ep_export.runtime import open_picture


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tiff"])
def test_common_formats_open_as_rgb(tmp_path, suffix):
    file = tmp_path / f"picture{suffix}"
    tiny_picture(40, 30).save(file)
    made = open_picture(file)
    assert (made.mode, made.size) == ("RGB", (40, 30))


def test_a_picture_is_turned_upright_by_its_exif_orientation(tmp_path):
    stored = tiny_picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    stored.save(tmp_path / "picture.png", exif=exif)
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "picture.png")), np.asarray(upright))


def test_the_first_frame_of_an_animation_is_the_picture(tmp_path):
    frames = [tiny_picture(20, 20, seed=i) for i in range(3)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(open_picture(tmp_path / "moving.png")), np.asarray(frames[0]))


def truncated(path):
    tiny_picture(200, 200).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:4000])


def bomb(path):
    """A valid PNG header that promises 100000 x 100000 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: None, "is not a file"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("hello"), "is not a picture"),
        (truncated, "is damaged"),
        (bomb, "is too large"),
    ],
    ids=["missing", "directory", "empty", "text", "truncated", "bomb"],
)
def test_bad_files_get_one_line_and_a_hint(tmp_path, make, said):
    file = tmp_path / "picture.png"
    make(file)
    with pytest.raises(UserError, match=said) as caught:
        open_picture(file)
    assert str(file) in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_picture_beyond_the_limit_is_refused_not_warned_about(tmp_path, monkeypatch):
    tiny_picture(40, 30).save(tmp_path / "picture.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="too large"):
        open_picture(tmp_path / "picture.png")


def test_postscript_is_never_run_whatever_the_file_is_called(tmp_path, monkeypatch):
    def run(*_args, **_options):
        pytest.fail("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    file = tmp_path / "photo.png"
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(file) as picture:
        assert picture.format == "EPS"  # Pillow itself would take it
    with pytest.raises(UserError, match="not a picture that can be read"):
        open_picture(file)


@pytest.mark.parametrize("suffix", [".dds", ".psd", ".sgi", ".icns", ".avif"])
def test_other_formats_are_refused_by_content(tmp_path, suffix):
    source = tmp_path / f"source{suffix}"
    try:
        tiny_picture(16, 16).save(source)
    except (OSError, KeyError, ValueError):
        source.write_bytes(b"8BPS" + b"\x00\x01" + b"\x00" * 40)
    (tmp_path / "photo.png").write_bytes(source.read_bytes())
    with pytest.raises(UserError, match="not a picture that can be read") as caught:
        open_picture(tmp_path / "photo.png")
    assert "JPEG" in caught.value.hint


@pytest.mark.parametrize(
    "error",
    [RuntimeError, NotImplementedError, TypeError, IndexError, KeyError, ZeroDivisionError, struct.error],
)
def test_whatever_a_decoder_raises_is_the_picture_s_fault(tmp_path, monkeypatch, error):
    def load(_self):
        raise error("bad\nblock")

    tiny_picture(20, 20).save(tmp_path / "picture.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(UserError, match="is damaged") as caught:
        open_picture(tmp_path / "picture.png").load()
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_lack_of_memory_is_said_as_such(tmp_path, monkeypatch):
    def load(_self):
        raise MemoryError

    tiny_picture(20, 20).save(tmp_path / "picture.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(UserError, match="more memory than there is"):
        open_picture(tmp_path / "picture.png")


def test_odd_notes_in_a_good_picture_print_nothing(tmp_path, recwarn):
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff"  # promises 65535 entries
    tiny_picture(20, 20).save(tmp_path / "picture.jpg", exif=exif)
    assert open_picture(tmp_path / "picture.jpg").size == (20, 20)
    assert not recwarn.list

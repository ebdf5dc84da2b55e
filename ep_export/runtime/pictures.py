"""Picture files as people see them: turned upright, RGB. Files are not trusted."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ep_export.errors import UserError, as_user_error
from ep_export.families.picture_modes import to_rgb

__all__ = ["FORMATS", "SUFFIXES", "open_picture", "opened", "read_picture"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read, by content. Pillow's other readers stay shut: the one of EPS starts Ghostscript, which runs
the file as a program, whatever the file is called."""
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What counts as a picture in a folder."""

_HINT = "give an intact JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file"


def open_picture(path: Path) -> Image.Image:
    """Open a picture file completely.

    The orientation its camera noted (EXIF) is applied. Hugging Face's processors ignore it, so a picture with
    such a note is answered here as it is seen, and there as it is stored.

    Returns:
        RGB, upright.

    Raises:
        UserError: Missing, empty, not a picture, truncated, or larger than Pillow's limit against
            decompression bombs (about 89 million pixels).
    """
    if not path.is_file():
        raise UserError(f"picture {path} is not a file", hint="give the path of a picture")
    if path.stat().st_size == 0:
        raise UserError(f"picture {path} is empty", hint="give a picture with content")
    with opened(path) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))


def read_picture(data: bytes, *, name: str, most_pixels: int | None = None) -> Image.Image:
    """`open_picture` of a file that lies in memory.

    Not for several threads at once: Python's warnings are switched for all of them.

    Args:
        data: The file's bytes.
        name: What errors call it, "image 2".
        most_pixels: Refused before it is decoded when it has more.

    Raises:
        UserError: See `open_picture`, or too many pixels.
    """
    if not data:
        raise UserError(f"picture {name} is empty", hint="give a picture with content")
    with _opened(io.BytesIO(data), name) as picture:
        pixels = picture.width * picture.height
        if most_pixels is not None and pixels > most_pixels:
            raise UserError(
                f"picture {name} has {pixels} pixels, expected at most {most_pixels}",
                hint="scale it down first",
            )
        return to_rgb(ImageOps.exif_transpose(picture))


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture file, its pixels not read yet; whatever Pillow raises on them within the block is said.

    Raises:
        UserError: Not a picture, truncated, or too large.
    """
    with _opened(path, str(path)) as picture:
        yield picture


@contextmanager
def _opened(file: Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    with warnings.catch_warnings(), as_user_error(f"picture {name} is damaged", hint=_HINT):
        warnings.simplefilter("ignore")  # notices about odd notes in good files
        # Above half of what it refuses Pillow only warns; either is a bomb here.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=FORMATS) as picture:
                yield picture
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UserError(f"picture {name} is too large: {error}", hint="scale it down first") from error
        except UnidentifiedImageError as error:
            raise UserError(f"{name} is not a picture that can be read", hint=_HINT) from error
        except MemoryError as error:  # a small file may ask for gigabytes
            raise UserError(f"picture {name} needs more memory than there is", hint=_HINT) from error
        except PermissionError as error:
            raise UserError(f"picture {name} may not be read", hint="check its permissions") from error

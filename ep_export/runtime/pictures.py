"""Picture files as people see them: turned upright, RGB. Files are not trusted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ep_export.errors import UserError, as_user_error
from ep_export.families.picture_modes import to_rgb

__all__ = ["FORMATS", "SUFFIXES", "open_picture", "opened"]

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


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture file, its pixels not read yet; whatever Pillow raises on them within the block is said.

    Raises:
        UserError: Not a picture, truncated, or too large.
    """
    with warnings.catch_warnings(), as_user_error(f"picture {path} is damaged", hint=_HINT):
        warnings.simplefilter("ignore")  # notices about odd notes in good files
        # Above half of what it refuses Pillow only warns; either is a bomb here.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as picture:
                yield picture
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UserError(f"picture {path} is too large: {error}", hint="scale it down first") from error
        except UnidentifiedImageError as error:
            raise UserError(f"{path} is not a picture that can be read", hint=_HINT) from error
        except MemoryError as error:  # a small file may ask for gigabytes
            raise UserError(f"picture {path} needs more memory than there is", hint=_HINT) from error
        except PermissionError as error:
            raise UserError(f"picture {path} may not be read", hint="check its permissions") from error

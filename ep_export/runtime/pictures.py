"""Picture files as people see them: any format Pillow reads, turned upright, RGB. Files are not trusted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ep_export.errors import UserError
from ep_export.families.picture_modes import to_rgb

__all__ = ["open_picture", "reading"]


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
    with reading(path), Image.open(path) as opened:
        return to_rgb(ImageOps.exif_transpose(opened))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever Pillow raises on the content of a file, said in one sentence.

    Raises:
        UserError: Not a picture, truncated, or too large.
    """
    try:
        with warnings.catch_warnings():
            # Above half of what it refuses Pillow only warns; either is a bomb here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"picture {path} is too large: {error}", hint="scale it down first") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture Pillow can read", hint="give a PNG or JPEG file") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on bad data
        raise UserError(
            f"picture {path} is damaged: {error}", hint="give an intact PNG or JPEG file"
        ) from error

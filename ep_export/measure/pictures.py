"""Pictures of a folder, in a stable order and known by content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ep_export.errors import UserError

__all__ = ["SUFFIXES", "PictureFile", "find_pictures"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What counts as a picture; other files of the folder (labels, a README) are left alone."""


@dataclass(frozen=True)
class PictureFile:
    """One picture of the folder.

    Attributes:
        name: Path relative to the folder, with forward slashes.
        path: Where it lies.
    """

    name: str
    path: Path

    def sha256(self) -> str:
        """Hash of the file's bytes.

        Raises:
            OSError: It cannot be read.
        """
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def find_pictures(folder: Path, *, most: int | None = None, seed: int = 0) -> tuple[PictureFile, ...]:
    """Pictures below a folder, sorted by name.

    Args:
        folder: Searched with its subfolders.
        most: Take a random sample of so many when there are more.
        seed: Of the sample.

    Raises:
        UserError: No such folder, or no file with a picture's suffix in it.
    """
    if folder.is_file():
        raise UserError(f"image folder {folder} is a file", hint="give the directory that holds the pictures")
    if not folder.is_dir():
        raise UserError(f"image folder {folder} does not exist", hint="give a directory with pictures")
    files = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    pictures = sorted((PictureFile(path.relative_to(folder).as_posix(), path) for path in files), key=_name)
    if not pictures:
        known = ", ".join(sorted(SUFFIXES))
        raise UserError(f"image folder {folder} holds no picture", hint=f"files that count: {known}")
    if most is not None and len(pictures) > most:
        chosen = np.random.default_rng(seed).choice(len(pictures), size=most, replace=False)
        pictures = [pictures[i] for i in sorted(chosen)]
    return tuple(pictures)


def _name(picture: PictureFile) -> str:
    return picture.name

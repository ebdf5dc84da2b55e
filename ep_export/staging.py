"""Outputs are built aside and renamed into place: whole or absent, also after Ctrl-C."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ep_export.errors import UserError

__all__ = ["refuse_existing", "staged"]


def refuse_existing(out: Path, *, overwrite: bool, marker: str) -> None:
    """Check early that `out` may be written.

    Args:
        out: The directory to be made.
        overwrite: It may replace an earlier output.
        marker: File that every output of this kind holds. A directory without it is somebody's own and is
            never replaced.

    Raises:
        UserError: It exists and may not be replaced, or its parent cannot be written.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already", hint="give another --out, or --overwrite to replace it")
    if out.exists() and not (out / marker).is_file() and not _is_empty(out):
        raise UserError(f"{out} was not made by ep-export: it has no {marker}", hint="give another --out")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written", hint="give an --out you may write to")


@contextmanager
def staged(out: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well and vanishes otherwise.

    It lies on the same file system as `out`, so that hard links stay possible and the rename is atomic.

    Raises:
        UserError: See `refuse_existing`.
    """
    refuse_existing(out, overwrite=overwrite, marker=marker)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp makes it private
        _replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_empty(out: Path) -> bool:
    return out.is_dir() and next(out.iterdir(), None) is None


def _replace(aside: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)

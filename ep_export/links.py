"""A file in a second place: a hard link where the file system allows one, else a copy.

Symbolic links would not do: ONNX Runtime refuses external data behind them, and they break when a directory
is copied to another machine.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from ep_export.errors import UserError

__all__ = ["copy", "link", "link_or_copy"]

# What os.link says on another file system, on one without hard links or with too many, or
# (protected_hardlinks) when the file belongs to someone else.
_NO_LINK = frozenset(
    (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EACCES, errno.ENOSYS)
)


def link_or_copy(source: Path, target: Path) -> bool:
    """Make `target` the same file as `source`, or a copy of it. Folders above `target` are made.

    Returns:
        Whether it is a link.

    Raises:
        UserError: It must be copied and does not fit on the disk.
    """
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if not link(source, target):
        return True
    copy(source, target, hint="write to the file system the bundle lies on, where files are linked instead")
    return False


def link(source: Path, target: Path) -> str:
    """Make `target` the same file as `source`, which is no symbolic link.

    Returns:
        Why the system allows no hard link here; empty when it was made.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return error.strerror or str(error)
    return ""


def copy(source: Path, target: Path, *, hint: str) -> int:
    """Copy a file, when it fits on the disk.

    Returns:
        Its bytes.

    Raises:
        UserError: It does not fit; `hint` is the error's.
    """
    size, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if size > free:
        raise UserError(
            f"no space to copy {source.name}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free", hint=hint
        )
    shutil.copyfile(source, target)
    return size

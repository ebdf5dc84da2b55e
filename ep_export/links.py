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

__all__ = ["link_or_copy"]

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
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    else:
        return True
    size, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if size > free:
        raise UserError(
            f"no space to copy {source.name}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
            hint="write to the file system the bundle lies on, where files are linked instead",
        )
    shutil.copyfile(source, target)
    return False

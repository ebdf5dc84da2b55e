"""Where the data that ships with ep-export lies: calibration records, engine targets, plugin sources.

In a checkout these are the repository's own top-level folders; a wheel carries copies under `_data`.
"""

from __future__ import annotations

from pathlib import Path

from ep_export.errors import UserError

__all__ = ["data_dir"]

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Directory of shipped data.

    Args:
        name: "calibration", "engines" or "plugins".

    Raises:
        UserError: This installation lacks it.
    """
    for directory in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if directory.is_dir():
            return directory
    raise UserError(f"this installation of ep-export lacks its {name} data", hint="install ep-export again")

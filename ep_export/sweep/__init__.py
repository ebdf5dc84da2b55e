"""Many ways of pruning, compared on one model and one set of questions.

`record` needs no torch; `sweep` and its options are imported on first use because they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ep_export.sweep.record import SweepRecord, read_sweep, write_sweep

if TYPE_CHECKING:
    from ep_export.sweep.options import SweepOptions
    from ep_export.sweep.run import sweep

__all__ = ["SweepOptions", "SweepRecord", "read_sweep", "sweep", "write_sweep"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    if name == "SweepOptions":
        from ep_export.sweep.options import SweepOptions

        return SweepOptions
    if name == "sweep":
        from ep_export.sweep.run import sweep

        return sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

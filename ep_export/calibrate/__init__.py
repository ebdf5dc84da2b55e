"""Where and how to prune a model: measured on pictures, or read from a record.

`record` and `choose` need no torch; `calibrate` is imported on first use because it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ep_export.calibrate.choose import ScheduleRequest, find_published, needs_calibration, resolve_schedule
from ep_export.calibrate.record import Candidate, Provenance, Record, read_calibration, write_calibration

if TYPE_CHECKING:
    from ep_export.calibrate.figure import plot
    from ep_export.calibrate.run import calibrate

__all__ = [
    "Candidate",
    "Provenance",
    "Record",
    "ScheduleRequest",
    "calibrate",
    "find_published",
    "needs_calibration",
    "plot",
    "read_calibration",
    "resolve_schedule",
    "write_calibration",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch or matplotlib on first use."""
    if name == "calibrate":
        from ep_export.calibrate.run import calibrate

        return calibrate
    if name == "plot":
        from ep_export.calibrate.figure import plot

        return plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

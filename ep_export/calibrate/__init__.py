"""Where and how to prune a model: measured on pictures, or read from a record.

`record` and `choose` need no torch; `calibrate` is imported on first use because it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ep_export.calibrate.choose import PolicyRequest, find_published, needs_calibration, resolve_policy
from ep_export.calibrate.questions import GENERIC_QUESTIONS, read_questions
from ep_export.calibrate.record import Candidate, Provenance, Record, read_record, write_record

if TYPE_CHECKING:
    from ep_export.calibrate.figure import plot
    from ep_export.calibrate.run import calibrate

__all__ = [
    "GENERIC_QUESTIONS",
    "Candidate",
    "PolicyRequest",
    "Provenance",
    "Record",
    "calibrate",
    "find_published",
    "needs_calibration",
    "plot",
    "read_questions",
    "read_record",
    "resolve_policy",
    "write_record",
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

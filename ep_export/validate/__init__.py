"""Does a bundle compute what the pruned Hugging Face model does? Stage by stage, and a report of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ep_export.validate.report import Case, Report, Stage, Verdict, text_lines, to_json

if TYPE_CHECKING:
    from ep_export.validate.html import write_html
    from ep_export.validate.run import validate

__all__ = [
    "Case",
    "Report",
    "Stage",
    "Verdict",
    "text_lines",
    "to_json",
    "validate",
    "write_html",
]


def __getattr__(name: str) -> Any:
    """Import on first use: reading a report, or drawing one, needs neither torch nor ONNX Runtime."""
    if name == "validate":
        from ep_export.validate.run import validate

        return validate
    if name == "write_html":
        from ep_export.validate.html import write_html

        return write_html
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

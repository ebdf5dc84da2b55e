"""What this exporter does not do, refused before any work starts."""

from __future__ import annotations

from typing import Any

from ep_export.checkpoint import Checkpoint
from ep_export.errors import UserError
from ep_export.planning import check_schedule
from ep_export.policy import DEGREES, Schedule

__all__ = ["refuse_unsupported"]

_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional", "mrope")


def refuse_unsupported(checkpoint: Checkpoint, schedule: Schedule, degree: int) -> None:
    """Check a checkpoint and schedule against what the graphs can express.

    Raises:
        UserError: An impossible schedule, sliding-window layers, rotary tables that depend on the length at
            run time, or a degree that is not offered.
    """
    text = checkpoint.config.get_text_config()
    check_schedule(schedule, checkpoint.dims.layers)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UserError(
            f"{checkpoint.source} has {sorted(kinds)[0]} layers, expected full attention in every layer",
            hint="such models are not exported",
        )
    rope = _rope_type(text)
    if rope not in _STATIC_ROPE:
        raise UserError(
            f"{checkpoint.source} has rope_type {rope!r}, whose tables depend on the length at run time",
            hint=f"exported rope types: {', '.join(_STATIC_ROPE)}",
        )
    if degree not in DEGREES:
        raise UserError(
            f"degree {degree} of the entropy series is not a power of two that is offered",
            hint=f"give one of {', '.join(map(str, DEGREES))}",
        )


def _rope_type(text: Any) -> str:
    parameters = getattr(text, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))

"""The checkpoint a bundle was built from: where the manifest says it was, or where it was moved to."""

from __future__ import annotations

from pathlib import Path

from ep_export.bundle import Bundle
from ep_export.checkpoint.opening import Checkpoint, open_checkpoint
from ep_export.errors import UserError

__all__ = ["check_origin", "open_origin"]


def open_origin(bundle: Bundle, model: str | None = None) -> Checkpoint:
    """Open the checkpoint of a bundle.

    Args:
        bundle: The bundle.
        model: Where the checkpoint is now; None: where it was, or its alias or hub id.

    Raises:
        UserError: It is not there any more, it is another one, or see `open_checkpoint`.
    """
    named = bundle.manifest.model
    if model is None and Path(named).is_absolute() and not Path(named).is_dir():
        raise UserError(
            f"the checkpoint that {bundle.path} was built from is no longer at {named}",
            hint="say where it is now: --model DIR",
        )
    checkpoint = open_checkpoint(model or named)
    check_origin(bundle, checkpoint)
    return checkpoint


def check_origin(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Refuse to compare a bundle with another model.

    Raises:
        UserError: The bundle was not built from it.
    """
    if bundle.manifest.model_sha256 != checkpoint.fingerprint:
        raise UserError(
            f"bundle {bundle.path} was built from another checkpoint than {checkpoint.source}",
            hint=f"give the one it names with --model: {bundle.manifest.model}",
        )

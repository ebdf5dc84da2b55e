"""The policy that a calibration recommends, as one more competitor.

It must be chosen without looking at the questions of the sweep: from records made before, or by a calibration
on pictures of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ep_export.calibrate.pictures import find_pictures
from ep_export.calibrate.questions import GENERIC_QUESTIONS, Questions
from ep_export.calibrate.record import Record, read_record
from ep_export.calibrate.run import calibrate
from ep_export.errors import UserError
from ep_export.methods import Method, policy_method
from ep_export.policy import Keep
from ep_export.progress import Progress, silent
from ep_export.sweep.record import Recommended

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint

__all__ = ["RECOMMENDED", "Calibration", "recommended_methods", "recommended_policies"]

RECOMMENDED = "recommended"
"""Key of the competitor."""


@dataclass(frozen=True)
class Calibration:
    """Where recommendations come from.

    Attributes:
        records: Records on disk; each serves the keep it was made for, one without a keep all others.
        images: Folder to calibrate on for keeps that no record serves; None for none.
        prompts: Questions about these pictures.
        max_images: At most so many of them.
    """

    records: tuple[Path, ...] = ()
    images: Path | None = None
    prompts: Questions = GENERIC_QUESTIONS
    max_images: int | None = None


def recommended_policies(
    checkpoint: Checkpoint,
    calibration: Calibration,
    keeps: Sequence[float],
    *,
    asked: frozenset[str],
    seed: int,
    device: str,
    work: Path,
    progress: Progress = silent,
) -> tuple[Recommended, ...]:
    """What is recommended for every keep; keeps that nothing serves are left out.

    Args:
        checkpoint: The model.
        calibration: Where from.
        keeps: Averages.
        asked: Hashes of the sweep's own pictures.
        seed: Of a calibration made here.
        device: Of a calibration made here.
        work: Where its journal lies.
        progress: See `calibrate`.

    Raises:
        UserError: A record that cannot be read or belongs to another model; see also `calibrate`.
    """
    records = [_own_record(path, checkpoint) for path in calibration.records]
    found: list[Recommended] = []
    for keep in keeps:
        serving = [r for r in records if r.keep == Keep(ratio=keep)] or [r for r in records if r.keep is None]
        if serving:
            found.append(
                _recommended(keep, serving[0], calibration.records[records.index(serving[0])].name, None)
            )
        elif calibration.images is not None:

            def show(_stage: str, done: int, total: int, keep: float = keep) -> None:
                progress(f"calibrating for keep {keep:g}", done, total)

            record = calibrate(
                checkpoint,
                calibration.images,
                keep=Keep(ratio=keep),
                prompts=calibration.prompts,
                max_images=calibration.max_images,
                seed=seed,
                device=device,
                work=work,
                progress=show,
            )
            pictures = find_pictures(calibration.images, most=calibration.max_images, seed=seed)
            held_out = asked.isdisjoint(picture.sha256() for picture in pictures)
            found.append(_recommended(keep, record, calibration.images.name, held_out))
    return tuple(found)


def recommended_methods(recommended: Sequence[Recommended]) -> Mapping[float, tuple[int, Method]]:
    """By keep, the layer K and the method of its policy; keeps without one are left out."""
    return {
        one.keep: (
            one.policy.layer,
            policy_method(one.policy, key=RECOMMENDED, title="Recommended", source="ep-export calibrate"),
        )
        for one in recommended
        if one.policy is not None
    }


def _own_record(path: Path, checkpoint: Checkpoint) -> Record:
    record = read_record(path)
    other = record.fingerprint is not None and record.fingerprint != checkpoint.fingerprint
    if other or record.layers != checkpoint.dims.layers:
        raise UserError(
            f"calibration record {path.name} was made on another model ({record.model})",
            hint="give a record of this model, or pictures to calibrate on with --calibration-images",
        )
    return record


def _recommended(keep: float, record: Record, source: str, held_out: bool | None) -> Recommended:
    return Recommended(
        keep=keep,
        policy=record.recommended,
        reason=record.recommendation,
        pictures=record.images,
        source=source,
        held_out=held_out,
    )

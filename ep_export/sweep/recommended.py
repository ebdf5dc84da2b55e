"""What a calibration recommends, as one more competitor.

It must be chosen without looking at the questions of the sweep: from records made before, or by a calibration
on pictures of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ep_export.calibrate.choose import check_belongs
from ep_export.calibrate.record import Record, read_calibration
from ep_export.calibrate.run import calibrate
from ep_export.measure.executors import Executor
from ep_export.measure.pictures import find_pictures
from ep_export.measure.prompts import GENERIC_QUESTIONS, Questions
from ep_export.policy import Keep
from ep_export.progress import Progress, silent
from ep_export.sweep.record import Recommended

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint

__all__ = ["Calibration", "recommendations"]


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


def recommendations(
    checkpoint: Checkpoint,
    calibration: Calibration,
    keeps: Sequence[float],
    *,
    pictures: frozenset[str],
    seed: int,
    device: str,
    executor: Executor | None,
    work: Path,
    progress: Progress = silent,
) -> tuple[Recommended, ...]:
    """What is recommended for every keep; keeps that nothing serves are left out.

    Args:
        checkpoint: The model.
        calibration: Where from.
        keeps: Averages.
        pictures: Hashes of the sweep's own pictures.
        seed: Of a calibration done here.
        device: Of a calibration done here.
        executor: Of a calibration done here.
        work: Where its journal lies.
        progress: See `calibrate`.

    Raises:
        UserError: A record that cannot be read or belongs to another model; see also `calibrate`.
    """
    records = {path.name: read_calibration(path) for path in calibration.records}
    for name, record in records.items():
        check_belongs(record, checkpoint, name)
    recommended: list[Recommended] = []
    for keep in keeps:
        own = [name for name, record in records.items() if record.keep == Keep(ratio=keep)]
        serving = own or [name for name, record in records.items() if record.keep is None]
        if serving:
            recommended.append(_recommended(keep, records[serving[0]], serving[0], None))
        elif calibration.images is not None:
            record = calibrate(
                checkpoint,
                calibration.images,
                keep=Keep(ratio=keep),
                prompts=calibration.prompts,
                max_images=calibration.max_images,
                seed=seed,
                device=device,
                executor=executor,
                work=work,
                progress=functools.partial(_for_keep, progress, keep),
            )
            calibrated = find_pictures(calibration.images, most=calibration.max_images, seed=seed)
            held_out = pictures.isdisjoint(picture.sha256() for picture in calibrated)
            recommended.append(_recommended(keep, record, calibration.images.name, held_out))
    return tuple(recommended)


def _for_keep(progress: Progress, keep: float, _stage: str, done: int, total: int) -> None:
    progress(f"calibrating for keep {keep:g}", done, total)


def _recommended(keep: float, record: Record, source: str, held_out: bool | None) -> Recommended:
    return Recommended(
        keep=keep,
        schedule=record.recommended,
        reason=record.recommendation,
        pictures=record.images,
        source=source,
        held_out=held_out,
        threshold=record.adaptive if record.adaptive is not None and record.adaptive.ratio == keep else None,
    )

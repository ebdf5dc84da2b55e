"""Rounded weights as one more thing that a sweep compares: which, how they are rounded, and their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ep_export.calibrate.pictures import ask_about, first_shown
from ep_export.calibrate.weights import ROUNDING_PICTURES, rounded_shard
from ep_export.measure.bench import RoundedModel
from ep_export.measure.pictures import find_pictures
from ep_export.numerics import DEFAULT_GROUP, WeightKind, Weights
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.checkpoint import Checkpoint
    from ep_export.sweep.options import SweepOptions
    from ep_export.sweep.recommended import Calibration

__all__ = ["rounded_models", "sweep_weights", "weights_name"]


def sweep_weights(options: SweepOptions) -> tuple[Weights, ...]:
    """The rounded weights, and how they come about: by the calibration's pictures where there are any."""
    return tuple(
        replace(one, rounding="gptq" if _pictures(options) and one.kind is not WeightKind.FP8 else "nearest")
        for one in dict.fromkeys(options.weights)
    )


def weights_name(weights: Weights) -> str:
    """E.g. "int4", with another group than the usual one "int4-32"."""
    group = "" if weights.group in {None, DEFAULT_GROUP} else f"-{weights.group}"
    return f"{weights.kind.value}{group}"


@contextmanager
def rounded_models(
    checkpoint: Checkpoint, weights: Sequence[Weights], options: SweepOptions, *, progress: Progress = silent
) -> Iterator[tuple[RoundedModel, ...]]:
    """Shards of rounded weights, gone when the block ends.

    The pictures that are asked about do not decide how weights are rounded: they are what it is judged by.

    Args:
        checkpoint: Unquantised, where there are weights to round.
        weights: From `sweep_weights`.
        options: The sweep's.
        progress: Told about every layer.

    Raises:
        UserError: See `rounded_shard`.
    """
    shown: tuple[Sequence[Image.Image], Sequence[str]] = ((), ())
    calibration = _pictures(options)
    if weights and calibration is not None and calibration.images is not None:
        pictures = find_pictures(calibration.images, most=calibration.max_images, seed=options.seed)
        shown = first_shown(ask_about(pictures, calibration.prompts)[0], ROUNDING_PICTURES)
    with ExitStack() as shards:
        models = []
        for one in weights:
            shard = shards.enter_context(rounded_shard(checkpoint, one, *shown, progress=progress))
            models.append(RoundedModel(weights_name(one), str(shard)))
        yield tuple(models)


def _pictures(options: SweepOptions) -> Calibration | None:
    """The calibration, if it has pictures of its own."""
    calibration = options.calibration
    return calibration if calibration is not None and calibration.images is not None else None

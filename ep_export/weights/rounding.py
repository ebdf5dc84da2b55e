"""Rounding without data: to the nearest code, with a search for the scale that clips best.

Deterministic, a tensor at a time, some of its outputs at a time. Calibrated rounding is in `gptq_rounding`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.weights.packed import PackedLinear

__all__ = ["block_scales", "check_finite", "check_group", "round_nearest", "rounded_scales"]

_CLIPS = (0.9, 0.8, 0.7)
_STEPS = (0.05, 0.025)
"""Shares of a block's largest value that its largest code may stand for: 1 and these, then a step down and a
step up from the best so far. On normal and heavy-tailed weights the error ends within 0.6 % of the best of 21
shares from 0.6 to 1, which take nearly three times as long."""

_LARGEST = {WeightKind.INT4: 7.0, WeightKind.INT8: 127.0, WeightKind.FP8: 448.0}
_SMALLEST_SCALE = 2.0**-24  # float16's smallest number: a scale below it would be stored as 0
_COLUMNS = 1024  # outputs rounded at once: bounds memory, and a block of them stays in a core's cache


def round_nearest(
    weight: NDArray[Any], weights: Weights, *, scale_type: str = "float16", name: str = "weight"
) -> PackedLinear:
    """Round one linear layer, on every core.

    Args:
        weight: [in, out] of any float type, finite; it may be a view of a mapped file.
        weights: Kind and group.
        scale_type: What scales are rounded to, "float16" or "bfloat16": the type graphs compute in, or one
            that it holds exactly.
        name: For messages.

    Raises:
        UserError: The group does not divide the inputs, or a weight is not finite.
    """
    inputs, outputs = weight.shape
    check_group(inputs, weights, name)
    group = weights.group or inputs
    codes = np.empty((inputs, outputs), dtype=np.uint8 if weights.kind is WeightKind.FP8 else np.int8)
    scales = np.empty((inputs // group, outputs), dtype=np.float32)

    def some(start: int) -> None:
        part = slice(start, start + _COLUMNS)
        wide = weight[:, part].astype(np.float32)
        check_finite(wide, name)
        scales[:, part] = block_scales(wide.reshape(inputs // group, group, -1), weights.kind, scale_type)
        for block, scale in enumerate(scales[:, part]):
            rows = slice(block * group, (block + 1) * group)
            codes[rows, part] = _codes(wide[rows], scale, weights.kind)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(some, range(0, outputs, _COLUMNS)):
            pass
    return PackedLinear(weights.kind, codes, scales)


def block_scales(
    blocks: NDArray[np.float32], kind: WeightKind, scale_type: str = "float16"
) -> NDArray[np.float32]:
    """The scale of every block that leaves the smallest error, among shares of its largest value.

    Args:
        blocks: [blocks, group, out].
        kind: Eight bits need no clipping.
        scale_type: See `round_nearest`.

    Returns:
        [blocks, out], above 0.
    """
    scales = np.empty((blocks.shape[0], blocks.shape[2]), dtype=np.float32)
    for block, best in zip(blocks, scales, strict=True):
        for start in range(0, block.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            best[part] = _block_scale(np.ascontiguousarray(block[:, part]), kind, scale_type)
    return scales


def check_group(inputs: int, weights: Weights, name: str) -> None:
    """Refuse a layer that its group does not divide.

    Raises:
        UserError: Names the layer and its inputs.
    """
    if weights.group is not None and inputs % weights.group:
        raise UserError(
            f"{name} has {inputs} inputs, which groups of {weights.group} do not divide",
            hint="give a smaller --group, or --weights int8",
        )


def check_finite(weight: NDArray[np.float32], name: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: Names the layer.
    """
    if not np.isfinite(weight).all():
        raise UserError(f"{name} holds values that are not finite", hint="fetch the checkpoint again")


def rounded_scales(scales: NDArray[np.floating], scale_type: str) -> NDArray[np.float32]:
    """As the bundle stores them, above 0: the codes are then chosen for the scale that is used."""
    import ml_dtypes

    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[scale_type]
    rounded: NDArray[np.float32] = np.maximum(scales, _SMALLEST_SCALE).astype(kind).astype(np.float32)
    return rounded


def _block_scale(block: NDArray[np.float32], kind: WeightKind, scale_type: str) -> NDArray[np.float32]:
    """[out] for [group, out]."""
    widest = np.abs(block).max(axis=0) / np.float32(_LARGEST[kind])
    best = rounded_scales(widest, scale_type)
    if kind is not WeightKind.INT4:
        return best
    clip, least = np.ones_like(widest), _error(block, best)

    def consider(clips: NDArray[np.float32]) -> None:
        nonlocal clip, best, least
        scales = rounded_scales(widest * clips, scale_type)
        error = _error(block, scales)
        better = error < least
        clip, best, least = (
            np.where(better, new, old) for new, old in ((clips, clip), (scales, best), (error, least))
        )

    for share in _CLIPS:
        consider(np.full_like(widest, share))
    for step in _STEPS:
        middle = clip
        consider(middle - np.float32(step))
        consider(np.minimum(middle + np.float32(step), 1))
    return best


def _error(block: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """[out]: what rounding to 4 bits leaves, distances to the power 2.5 in sum.

    More than 2, because the few large weights matter more; 2.5, because a root and two products are ten times
    as fast as a power. In place: this is most of the time of rounding.
    """
    distance = block / scale
    root = np.rint(distance)
    np.clip(root, -8, 7, out=root)
    np.subtract(distance, root, out=distance)
    np.abs(distance, out=distance)
    np.sqrt(distance, out=root)
    np.multiply(root, distance, out=root)
    error: NDArray[np.float32] = np.einsum("ij,ij->j", root, distance) * (scale * scale * np.sqrt(scale))
    return error


def _codes(block: NDArray[np.float32], scale: NDArray[np.float32], kind: WeightKind) -> NDArray[Any]:
    """[group, out] int8, or the bits of float8 as uint8."""
    largest = _LARGEST[kind]
    if kind is WeightKind.FP8:
        import ml_dtypes

        small: NDArray[Any] = np.clip(block / scale, -largest, largest).astype(ml_dtypes.float8_e4m3fn)
        return small.view(np.uint8)
    codes: NDArray[Any] = np.clip(np.rint(block / scale), -largest - 1, largest).astype(np.int8)
    return codes

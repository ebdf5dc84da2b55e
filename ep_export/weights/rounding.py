"""Rounding without data: to the nearest code, with a search for the scale that clips best.

Deterministic, a tensor at a time. Calibrated rounding is in `gptq_rounding`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.weights.packed import PackedLinear

__all__ = ["CLIPS", "block_scales", "check_weight", "round_nearest", "rounded_scales"]

CLIPS = tuple(np.linspace(1.0, 0.6, 21).tolist())
"""Shares of a block's largest value that the search lets the largest code stand for."""

_NORM = 2.4
"""Of the error the search minimises: more than 2, because the few large weights matter more."""

_LARGEST = {WeightKind.INT4: 7, WeightKind.INT8: 127}
_LARGEST_FLOAT8 = 448.0
_SMALLEST_SCALE = 2.0**-24  # float16's smallest number: a scale below it would be stored as 0
_COLUMNS = 1024  # outputs rounded at once: bounds memory


def round_nearest(
    weight: NDArray[np.float32], weights: Weights, *, scale_type: str = "float16", name: str = "weight"
) -> PackedLinear:
    """Round one linear layer.

    Args:
        weight: [in, out], finite.
        weights: Kind and group.
        scale_type: What scales are rounded to, "float16" or "bfloat16": the type graphs compute in, or one
            that it holds exactly.
        name: For messages.

    Raises:
        UserError: The group does not divide the inputs, or a weight is not finite.
    """
    check_weight(weight, weights, name)
    if weights.kind is WeightKind.FP8:
        return _round_float8(weight, scale_type)
    inputs, outputs = weight.shape
    group = weights.group or inputs
    codes = np.empty((inputs, outputs), dtype=np.int8)
    scales = np.empty((inputs // group, outputs), dtype=np.float32)
    for start in range(0, outputs, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        blocks = weight[:, part].reshape(inputs // group, group, -1)
        scales[:, part] = block_scales(blocks, weights.kind, scale_type)
        codes[:, part] = _codes(blocks, scales[:, None, part], weights.kind).reshape(inputs, -1)
    return PackedLinear(weights.kind, codes, scales)


def block_scales(
    blocks: NDArray[np.float32], kind: WeightKind, scale_type: str = "float16"
) -> NDArray[np.float32]:
    """The scale of every block that leaves the smallest error, among `CLIPS` of the largest value.

    Args:
        blocks: [blocks, group, out].
        kind: int4 or int8; eight bits need no clipping.
        scale_type: See `round_nearest`.

    Returns:
        [blocks, out], above 0.
    """
    widest = np.abs(blocks).max(axis=1) / _LARGEST[kind]
    best = rounded_scales(widest, scale_type)
    if kind is WeightKind.INT8:
        return best
    least = _error(blocks, best, kind)
    for clip in CLIPS[1:]:
        scales = rounded_scales(widest * clip, scale_type)
        error = _error(blocks, scales, kind)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def check_weight(weight: NDArray[np.float32], weights: Weights, name: str) -> None:
    """Refuse what cannot be rounded.

    Raises:
        UserError: The group does not divide the inputs, or a weight is not finite.
    """
    if weights.group is not None and weight.shape[0] % weights.group:
        raise UserError(
            f"{name} has {weight.shape[0]} inputs, which groups of {weights.group} do not divide",
            hint="give a smaller --group, or --weights int8",
        )
    if not np.isfinite(weight).all():
        raise UserError(f"{name} holds values that are not finite", hint="fetch the checkpoint again")


def rounded_scales(scales: NDArray[np.floating], scale_type: str) -> NDArray[np.float32]:
    """As the bundle stores them, above 0: the codes are then chosen for the scale that is used."""
    import ml_dtypes

    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[scale_type]
    rounded: NDArray[np.float32] = np.maximum(scales, _SMALLEST_SCALE).astype(kind).astype(np.float32)
    return rounded


def _codes(blocks: NDArray[np.float32], scales: NDArray[np.float32], kind: WeightKind) -> NDArray[np.int8]:
    largest = _LARGEST[kind]
    codes: NDArray[np.int8] = np.clip(np.rint(blocks / scales), -largest - 1, largest).astype(np.int8)
    return codes


def _error(blocks: NDArray[np.float32], scales: NDArray[np.float32], kind: WeightKind) -> NDArray[np.float32]:
    """[blocks, out]."""
    wide = scales[:, None]
    distance = np.abs(_codes(blocks, wide, kind) * wide - blocks)
    error: NDArray[np.float32] = (distance**_NORM).sum(axis=1)
    return error


def _round_float8(weight: NDArray[np.float32], scale_type: str) -> PackedLinear:
    import ml_dtypes

    scales = rounded_scales(np.abs(weight).max(axis=0, keepdims=True) / _LARGEST_FLOAT8, scale_type)
    codes = np.clip(weight / scales, -_LARGEST_FLOAT8, _LARGEST_FLOAT8).astype(ml_dtypes.float8_e4m3fn)
    return PackedLinear(WeightKind.FP8, codes.view(np.uint8), scales)

"""How published checkpoints pack 4-bit codes, and back: AWQ (gemm), GPTQ, compressed-tensors.

Every function takes a layer's tensors as they lie in the shards and gives a `PackedLinear` whose values are
bit for bit what the format defines. Shapes, ranges and scales are checked: the tensors are untrusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.numerics import WeightKind
from ep_export.weights.packed import PackedLinear

__all__ = ["Tensors", "from_awq", "from_channels", "from_gptq", "from_pack_quantized"]

Tensors = Mapping[str, NDArray[np.generic]]
"""A layer's tensors by the last part of their names; floats of any width, packed codes as int32."""

_WORD = 8
"""Codes of 4 bits in an int32."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's 8 columns its j-th nibble holds (AutoAWQ's gemm kernels)."""

_MIDDLE = 8
"""Unsigned codes are stored as signed ones by subtracting it."""

_HINT = "fetch the checkpoint again; if this persists its layout is not the one its config names"


def from_awq(name: str, tensors: Tensors, *, shape: tuple[int, int]) -> PackedLinear:
    """AWQ, version gemm: qweight int32 [in, out/8], qzeros int32 [in/g, out/8], scales [in/g, out].

    Args:
        name: Of the layer, for messages.
        tensors: qweight, qzeros, scales.
        shape: (in, out) of the layer.

    Raises:
        UserError: A tensor is missing or misshapen, or a scale is not above 0 and finite.
    """
    inputs, outputs = shape
    scales = _scales(name, tensors, "scales", shape, transposed=False)
    words = _shaped(name, tensors, "qweight", (inputs, _words(name, outputs)))
    zeros = _shaped(name, tensors, "qzeros", (len(scales), outputs // _WORD))
    return _unsigned(
        _unpack(words, axis=1, order=_AWQ_ORDER), scales, _unpack(zeros, axis=1, order=_AWQ_ORDER)
    )


def from_gptq(name: str, tensors: Tensors, *, shape: tuple[int, int], zero_offset: int) -> PackedLinear:
    """GPTQ: qweight int32 [in/8, out], qzeros int32 [in/g, out/8], scales [in/g, out], g_idx int32 [in].

    Args:
        name: Of the layer, for messages.
        tensors: qweight, qzeros, scales and, where inputs were reordered, g_idx.
        shape: (in, out) of the layer.
        zero_offset: What is added to stored zeros: 1 in version 1, 0 in version 2.

    Raises:
        UserError: As for `from_awq`; or g_idx names a group that is not there, or groups of several sizes.
    """
    inputs, outputs = shape
    scales = _scales(name, tensors, "scales", shape, transposed=False)
    words = _shaped(name, tensors, "qweight", (_words(name, inputs), outputs))
    zeros = _shaped(name, tensors, "qzeros", (len(scales), _words(name, outputs)))
    codes = _unpack(words, axis=0)
    # version 1 stores z - 1 in 4 bits: 15 stands for 0 there as the kernels add 1 and keep 4 bits
    unsigned = (_unpack(zeros, axis=1) + zero_offset) & 15
    return _reordered(name, _unsigned(codes, scales, unsigned), tensors.get("g_idx"))


def from_pack_quantized(name: str, tensors: Tensors, *, shape: tuple[int, int]) -> PackedLinear:
    """compressed-tensors, pack-quantized: weight_packed int32 [out, in/8], weight_scale [out, in/g].

    Asymmetric layers also have weight_zero_point int32 [out/8, in/g]; reordered ones weight_g_idx int32 [in].

    Raises:
        UserError: As for `from_gptq`.
    """
    inputs, outputs = shape
    scales = _scales(name, tensors, "weight_scale", shape, transposed=True)
    words = _shaped(name, tensors, "weight_packed", (outputs, _words(name, inputs)))
    codes = np.ascontiguousarray(_unpack(words, axis=1).T)
    zeros = None
    if "weight_zero_point" in tensors:
        packed = _shaped(name, tensors, "weight_zero_point", (_words(name, outputs), len(scales)))
        zeros = np.ascontiguousarray(_unpack(packed, axis=0).T)
    return _reordered(name, _unsigned(codes, scales, zeros), tensors.get("weight_g_idx"))


def from_channels(name: str, tensors: Tensors, *, shape: tuple[int, int], kind: WeightKind) -> PackedLinear:
    """compressed-tensors, int-quantized or float-quantized: weight [out, in], weight_scale [out, 1] or one.

    Args:
        name: Of the layer, for messages.
        tensors: weight (int8, or the bits of float8_e4m3fn as uint8), weight_scale, weight_zero_point.
        shape: (in, out) of the layer.
        kind: int8 or fp8.

    Raises:
        UserError: As for `from_awq`; or a weight that is not a number.
    """
    inputs, outputs = shape
    codes = np.ascontiguousarray(_shaped(name, tensors, "weight", (outputs, inputs)).T)
    if kind is WeightKind.FP8 and ((codes & 0x7F) == 0x7F).any():
        raise UserError(f"{name} holds values that are not numbers", hint=_HINT)
    raw = np.asarray(tensors["weight_scale"], dtype=np.float32) if "weight_scale" in tensors else None
    if raw is not None and raw.size == 1:
        raw = np.full((outputs, 1), raw.reshape(-1)[0], dtype=np.float32)
    scales = _scales(
        name, {"weight_scale": raw} if raw is not None else {}, "weight_scale", shape, transposed=True
    )
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and np.any(zeros):
        zeros = np.broadcast_to(np.asarray(zeros, dtype=np.int8).reshape(-1, 1), (outputs, 1)).T
        return PackedLinear(kind, codes, scales, np.ascontiguousarray(zeros))
    return PackedLinear(kind, codes, scales)


def _unsigned(
    codes: NDArray[np.int8], scales: NDArray[np.float32], zeros: NDArray[np.int8] | None
) -> PackedLinear:
    """From codes and zeros of 0 to 15. Where every zero is the middle, the layer is symmetric."""
    signed = None if zeros is None else (zeros - _MIDDLE).astype(np.int8)
    if signed is not None and not signed.any():
        signed = None
    return PackedLinear(WeightKind.INT4, (codes - _MIDDLE).astype(np.int8), scales, signed)


def _reordered(name: str, linear: PackedLinear, groups: NDArray[np.generic] | None) -> PackedLinear:
    """Inputs sorted by group, when they are not: equal groups become neighbours, as blocks need them."""
    if groups is None:
        return linear
    inputs, blocks = linear.codes.shape[0], linear.scales.shape[0]
    index = np.asarray(groups).astype(np.int64)
    if index.shape != (inputs,) or index.min(initial=0) < 0 or index.max(initial=0) >= blocks:
        raise UserError(
            f"{name}.g_idx has shape {list(index.shape)} and values {index.min(initial=0)} to "
            f"{index.max(initial=0)}, expected {inputs} groups from 0 to {blocks - 1}",
            hint=_HINT,
        )
    order = np.argsort(index, kind="stable")
    if (order == np.arange(inputs)).all() and (index[order] == np.arange(inputs) // linear.group).all():
        return linear
    if (np.bincount(index, minlength=blocks) != linear.group).any():
        raise UserError(f"{name}.g_idx puts inputs into groups of different sizes", hint=_HINT)
    return PackedLinear(linear.kind, linear.codes[order], linear.scales, linear.zeros, order)


def _unpack(
    words: NDArray[np.generic], *, axis: int, order: Sequence[int] = range(_WORD)
) -> NDArray[np.int8]:
    """Codes 0 to 15 from int32 words, eight along `axis`; nibble j of a word is its column `order[j]`."""
    bits = np.asarray(words).view(np.uint32)
    rows, columns = bits.shape
    shape = (rows * _WORD, columns) if axis == 0 else (rows, columns * _WORD)
    codes = np.empty(shape, dtype=np.int8)
    for nibble, place in enumerate(order):
        part = (bits >> np.uint32(4 * nibble)) & np.uint32(15)
        if axis == 0:
            codes[place::_WORD] = part
        else:
            codes[:, place::_WORD] = part
    return codes


def _words(name: str, size: int) -> int:
    if size % _WORD:
        raise UserError(
            f"{name} has an axis of {size}, which words of {_WORD} codes do not divide", hint=_HINT
        )
    return size // _WORD


def _shaped(name: str, tensors: Tensors, part: str, shape: tuple[int, int]) -> NDArray[np.generic]:
    tensor = tensors.get(part)
    if tensor is None:
        raise UserError(f"{name} has no tensor {part}", hint=_HINT)
    if tensor.shape != shape or tensor.dtype.kind not in "iu":
        raise UserError(
            f"{name}.{part} is {tensor.dtype.name} {list(tensor.shape)}, expected {list(shape)}", hint=_HINT
        )
    return tensor


def _scales(
    name: str, tensors: Tensors, part: str, shape: tuple[int, int], *, transposed: bool
) -> NDArray[np.float32]:
    """[blocks, out] float32, checked."""
    if part not in tensors:
        raise UserError(f"{name} has no tensor {part}", hint=_HINT)
    inputs, outputs = shape
    scales = np.asarray(tensors[part])
    if transposed and scales.ndim == 2:
        scales = scales.T
    fits = (
        scales.ndim == 2 and scales.shape[1] == outputs and scales.shape[0] and not inputs % scales.shape[0]
    )
    if not fits:
        raise UserError(
            f"{name}.{part} has shape {list(tensors[part].shape)}, which fits no layer of {inputs} inputs "
            f"and {outputs} outputs",
            hint=_HINT,
        )
    wide = np.ascontiguousarray(scales, dtype=np.float32)
    if not (np.isfinite(wide) & (wide != 0)).all():
        raise UserError(f"{name}.{part} holds scales that are 0 or not finite", hint=_HINT)
    if (wide < 0).any():
        raise UserError(f"{name}.{part} holds negative scales", hint=_HINT)
    return wide

"""Checkpoints rewritten in the layouts quantised ones are published in, word by word after their formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ep_export.checkpoint import open_checkpoint
from ep_export.export.packing import linear_weights

__all__ = ["AWQ_ORDER", "LAYOUTS", "along_columns", "along_rows", "publish"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 16

_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_CHANNEL = {"num_bits": 8, "strategy": "channel"}


def _compressed(layout: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
LAYOUTS: Mapping[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {**_GPTQ, "desc_act": False},
    "gptq-reordered": {**_GPTQ, "desc_act": True},
    "gptq-v2": {**_GPTQ, "checkpoint_format": "gptq_v2"},
    "packed": _compressed("pack-quantized", {**_INT4, "symmetric": True}),
    "packed-asymmetric": _compressed("pack-quantized", {**_INT4, "symmetric": False}),
    "int8": _compressed("int-quantized", {**_CHANNEL, "type": "int"}),
    "float8": _compressed("float-quantized", {**_CHANNEL, "type": "float"}),
}
"""Name -> quantization_config."""


def publish(source: Path, out: Path, layout: str, *, skip: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Write `source` into `out` with its decoder's linear layers quantised.

    Args:
        source: An unquantised checkpoint.
        out: Must not exist.
        layout: One of `LAYOUTS`.
        skip: Parts of names of layers that stay as they are.

    Returns:
        Name of a weight in the Hugging Face model -> what the format says it is worth, [out, in] float32.
    """
    checkpoint = open_checkpoint(str(source))
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    names = [n for n in linear_weights(checkpoint).decoder if not any(part in n for part in skip)]
    tensors, worth = {}, {}
    for name, ref in checkpoint.tensors.items():
        weight = _read(ref)
        if name not in names:
            tensors[ref.name] = weight
            continue
        layer = ref.name.removesuffix(".weight")
        parts, worth[name] = _pack(layout, weight.float().numpy(), seed=len(worth))
        tensors |= {f"{layer}.{part}": torch.from_numpy(values) for part, values in parts.items()}
        if layout == "float8":
            tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].view(torch.float8_e4m3fn)
    save_file(tensors, out / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = LAYOUTS[layout]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return worth


def along_columns(matrix, order=range(8)):
    """[rows, columns] codes 0 to 15 -> [rows, columns / 8] words; nibble j holds column order[j]."""
    rows, columns = matrix.shape
    words = [[_word([row[8 * i + j] for j in order]) for i in range(columns // 8)] for row in matrix]
    return np.array(words, dtype=np.int32).reshape(rows, columns // 8)


def along_rows(matrix):
    """[rows, columns] codes -> [rows / 8, columns] words."""
    return np.ascontiguousarray(along_columns(matrix.T).T)


def _word(codes) -> int:
    """Eight codes as one int32, the first in the lowest bits."""
    value = sum(int(code) << (4 * place) for place, code in enumerate(codes))
    return value - (1 << 32) if value >= 1 << 31 else value


def _read(ref) -> torch.Tensor:
    data = bytearray(ref.file.read_bytes()[ref.offset : ref.offset + ref.length])
    return torch.frombuffer(data, dtype=getattr(torch, ref.dtype)).reshape(ref.shape)


def _pack(layout: str, weight: np.ndarray, *, seed: int) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """A layer's tensors [out, in], and what they are worth."""
    if layout in {"int8", "float8"}:
        return _channels(layout, weight)
    inputs = weight.shape[1]
    groups = np.arange(inputs) // GROUP
    if layout == "gptq-reordered":
        groups = np.random.default_rng(seed).permutation(groups)
    symmetric = layout == "packed"
    columns = weight.T  # [in, out]
    blocks = [columns[groups == g] for g in range(inputs // GROUP)]
    low, high = (np.stack([f(block, axis=0) for block in blocks]) for f in (np.min, np.max))
    if symmetric:
        scales = np.maximum(np.abs(low), np.abs(high)) / 7
        zeros = np.full(scales.shape, 8)
    else:
        scales = (high - low) / 15
        zeros = np.clip(np.rint(-low / np.maximum(scales, 1e-6)), 1, 15).astype(np.int64)
    scales = np.maximum(scales, 1e-6).astype(np.float16)
    codes = np.clip(np.rint(columns / scales.astype(np.float32)[groups]) + zeros[groups], 0, 15).astype(int)
    worth = torch.from_numpy(((codes - zeros[groups]) * scales.astype(np.float32)[groups]).T.copy())
    if layout == "awq":
        parts = {
            "qweight": along_columns(codes, AWQ_ORDER),
            "qzeros": along_columns(zeros, AWQ_ORDER),
            "scales": scales,
        }
    elif layout.startswith("gptq"):
        stored = zeros - (0 if layout == "gptq-v2" else 1)
        parts = {
            "qweight": along_rows(codes),
            "qzeros": along_columns(stored),
            "scales": scales,
            "g_idx": groups.astype(np.int32),
        }
    else:
        parts = {
            "weight_packed": along_columns(codes.T),
            "weight_scale": np.ascontiguousarray(scales.T),
            "weight_shape": np.array(weight.shape, dtype=np.int64),
        }
        if not symmetric:
            parts["weight_zero_point"] = along_rows(zeros.T)
    return parts, worth.float()


def _channels(layout: str, weight: np.ndarray) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    import ml_dtypes

    largest = 127 if layout == "int8" else 448
    scales = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / largest, 1e-6).astype(np.float32)
    scaled = weight / scales
    if layout == "int8":
        codes = np.rint(scaled).astype(np.int8)
        return {"weight": codes, "weight_scale": scales}, torch.from_numpy(codes * scales)
    codes = scaled.astype(ml_dtypes.float8_e4m3fn)
    worth = torch.from_numpy(codes.astype(np.float32) * scales)
    return {"weight": codes.view(np.uint8), "weight_scale": scales}, worth

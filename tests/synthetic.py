"""Checkpoints of published shapes with made-up weights, written by streaming: full size without a download.

Tensor names are the old ones that transformers itself would save (`language_model.model.layers.*`,
`visual.*`), so that opening one renames them.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ep_export.checkpoint import meta_model, open_config

__all__ = ["checkpoint_bytes", "config_of", "write_synthetic"]

_SHARD_BYTES = 4 << 30
_BLOCK = 1 << 25  # elements of the random block every tensor is cut from


def config_of(alias: str, layers: int) -> dict[str, object]:
    """The shipped config of a published model with another number of decoder layers, as JSON."""
    from ep_export.aliases import find_alias

    known = find_alias(alias)
    assert known is not None
    config = json.loads(known.config_file.read_text())
    text = config.get("text_config", config)  # Qwen's configs are flat
    text["num_hidden_layers"] = layers
    if "max_window_layers" in text:
        text["max_window_layers"] = layers
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:layers]
    return config


def checkpoint_bytes(config: dict[str, object], path: Path) -> int:
    """Bytes of weights a config asks for, in bfloat16."""
    return sum(2 * math.prod(shape) for shape in _shapes(config, path).values())


def write_synthetic(path: Path, config: dict[str, object], *, sparse: bool = False) -> Path:
    """Write config.json, index and shards.

    Args:
        path: Directory to create; left alone when it already holds a finished checkpoint.
        config: As `config_of`.
        sparse: Zeros in a sparse file instead of random values: takes no disk space and no time.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    shards = list(_sharded(_shapes(config, path)))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = path / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(file, shard, sparse=sparse)
        weight_map.update(dict.fromkeys(shard, file.name))
    # Last, and renamed into place: its presence says that the checkpoint is whole.
    part = index.with_suffix(".part")
    part.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    part.replace(index)
    return path


def free_bytes(path: Path) -> int:
    """Free space where `path` will lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _shapes(config: dict[str, object], path: Path) -> dict[str, tuple[int, ...]]:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    from transformers.core_model_loading import revert_weight_conversion

    model = meta_model(open_config(str(path)).config)
    tied = set(model.all_tied_weights_keys)
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, state).items()}


def _sharded(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        if shard and size + length > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += length
    yield shard


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], *, sparse: bool) -> None:
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        if sparse:
            stream.truncate(8 + len(raw) + offset)
            return
        block = _random_block()
        rng = np.random.default_rng(0)
        left = offset // 2
        while left > 0:  # from another place in the block every time
            start = int(rng.integers(0, _BLOCK // 2))
            piece = block[start : start + min(left, _BLOCK // 2)]
            piece.tofile(stream)
            left -= len(piece)


def _random_block() -> np.ndarray:
    """Normal values of scale 0.02 as the upper halves of float32: bfloat16, truncated."""
    values = np.random.default_rng(1).standard_normal(_BLOCK, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)

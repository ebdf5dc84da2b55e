"""Which numbers a config may hold at all: decided once, before anything is computed from them.

The bounds are several times the largest published model's (Llama 3.1 405B: 126 layers of 16384; Gemma 3:
262208 tokens; Llama 4 Scout: 10 million positions). They are there because a config is somebody's file: a
layer count of 10^9 would fill the memory with a list of layers before anything looked wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ep_export.dims import DecoderDims
from ep_export.errors import UserError

__all__ = ["check_dims", "check_settings", "check_sizes"]

_LAYERS, _HEADS, _WIDTH, _ROWS = (1, 1024), (1, 4096), (1, 1 << 20), (1, 1 << 24)
_POSITIONS, _PIXELS, _RATIO = (1, 1 << 30), (1, 1 << 14), (1, 256)

_CONFIG: Mapping[str, tuple[int, int]] = {
    "depth": _LAYERS,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "embed_dim": _WIDTH,
    "head_dim": _WIDTH,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "out_hidden_size": _WIDTH,
    "vocab_size": _ROWS,
    "max_position_embeddings": _POSITIONS,
    "image_size": _PIXELS,
    "patch_size": _PIXELS,
    "window_size": _PIXELS,
    "in_channels": _RATIO,
    "num_channels": _RATIO,
    "mlp_ratio": _RATIO,
    "scale_factor": _RATIO,
    "spatial_merge_size": _RATIO,
    "temporal_patch_size": _RATIO,
    "tokens_per_second": _RATIO,
}
_DIMS: Mapping[str, tuple[int, int]] = {
    "layers": _LAYERS,
    "heads": _HEADS,
    "kv_heads": _HEADS,
    "hidden_size": _WIDTH,
    "head_dim": _WIDTH,
    "ffn_size": _WIDTH,
    "vocab_size": _ROWS,
    "max_positions": _POSITIONS,
}
_PARTS = ("text_config", "vision_config")

_SETTINGS: Mapping[str, tuple[int, int]] = {
    "merge_size": _RATIO,
    "patch_size": _PIXELS,
    "temporal_patch_size": _RATIO,
    "max_video_tokens": _ROWS,
    "min_pixels": (1, 1 << 24),
    "max_pixels": (1, 1 << 28),
}
_SIZES = ("crop_size", "max_image_size", "size", "video_size")
# A picture 200 times as long as narrow (more is refused) then stays below 700 MB in RGB. Published: 448.
_SHORTEST_EDGE = (1, 1024)


def check_sizes(raw: Mapping[str, Any], where: str) -> None:
    """Refuse a config whose sizes are no sizes.

    A null is left to transformers, which takes it for "not given" in some fields.

    Args:
        raw: A checkpoint's config.json.
        where: What errors call it.

    Raises:
        UserError: Names the field, what it holds and what it may hold; or a part that is no object.
    """
    for part in ("", *_PARTS):
        values = (raw.get(part) or {}) if part else raw
        if not isinstance(values, Mapping):
            raise UserError(
                f"{where} has {part} {values!r}, expected an object", hint="get the file from its maker again"
            )
        kind = values.get("model_type")  # the whole's is looked at before
        if kind is not None and not isinstance(kind, str):
            raise UserError(
                f"{where} has {part}.model_type {kind!r}, expected a name",
                hint="get the file from its maker again",
            )
        for name, bounds in _CONFIG.items():
            _check(values.get(name), bounds, f"{part}.{name}" if part else name, where)


def check_settings(raw: Mapping[str, Any], where: str, *, areas: bool = False) -> None:
    """Refuse settings of an image or video processor whose sizes are no sizes.

    Args:
        raw: From preprocessor_config.json, or the part of another file that stands for it.
        where: What errors call it.
        areas: Whether sizes count the pixels of a whole picture, as Qwen's do, and not those of an edge.

    Raises:
        UserError: Names the setting, what it holds and what it may hold.
    """
    for name, bounds in _SETTINGS.items():
        _check(raw.get(name), bounds, name, where)
    sampling = raw.get("video_sampling") or {}
    if not isinstance(sampling, Mapping):
        raise UserError(
            f"{where} has video_sampling {sampling!r}, expected an object",
            hint="get the file from its maker again",
        )
    for name in _SIZES:
        size = (sampling if name == "video_size" else raw).get(name)
        if isinstance(size, Mapping):
            for key, value in size.items():
                _check(value, _size_bounds(str(key), areas=areas), f"{name}.{key}", where)
        else:
            _check(size, _size_bounds("shortest_edge", areas=areas), name, where)


def _size_bounds(key: str, *, areas: bool) -> tuple[int, int]:
    shortest = key == "shortest_edge"
    if areas:
        return _SETTINGS["min_pixels" if shortest else "max_pixels"]
    return _SHORTEST_EDGE if shortest else _PIXELS


def _check(value: Any, bounds: tuple[int, int], field: str, where: str) -> None:
    least, most = bounds
    if value is not None and not (type(value) is int and least <= value <= most):
        raise UserError(
            f"{where} has {field} {value!r}, expected a whole number from {least} to {most}",
            hint="get the file from its maker again",
        )


def check_dims(dims: DecoderDims, where: str) -> None:
    """Refuse dimensions that no decoder here has.

    Args:
        dims: From a config or a manifest.
        where: What errors call that.

    Raises:
        UserError: Names the first that is out of bounds or does not fit another.
    """
    hint = "get the file from its maker again"
    for name, bounds in _DIMS.items():
        _check(getattr(dims, name), bounds, name, where)
    if dims.position_axes not in {1, 3}:
        raise UserError(f"{where} has position_axes {dims.position_axes!r}, expected 1 or 3", hint=hint)
    if dims.heads % dims.kv_heads:
        raise UserError(
            f"{where} has {dims.heads} heads and {dims.kv_heads} kv heads, which do not divide", hint=hint
        )

"""Which layout a published checkpoint's `quantization_config` names, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ep_export.errors import UserError, near_matches
from ep_export.numerics import WeightKind, Weights
from ep_export.weights.layouts import Tensors, from_awq, from_channels, from_gptq, from_pack_quantized
from ep_export.weights.packed import PackedLinear

__all__ = ["Published", "layer_and_part", "read_published"]

_REFUSED = {
    "bitsandbytes": "its 4-bit codes are not evenly spaced, so no integer type holds them",
    "modelopt": "NVFP4 and ModelOpt's scales of scales are not read",
    "fp8": "block-wise float8 is not read",
    "fbgemm_fp8": "its float8 weights are not read",
    "quark": "its layouts are not read",
    "hqq": "its layouts are not read",
    "torchao": "its tensors are pickled objects",
    "aqlm": "its codes are entries of code books",
    "eetq": "its layouts are not read",
    "higgs": "its codes are entries of code books",
    "vptq": "its codes are entries of code books",
    "spqr": "its layouts are not read",
    "mxfp4": "its 4-bit floats are not read",
}
"""quant_method -> why not."""

_WAY_OUT = "give its AWQ, GPTQ or compressed-tensors checkpoint, or the unquantized one with --weights int4"
_READ = ("awq", "gptq", "compressed-tensors")
_CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Published:
    """The layout of a quantised checkpoint.

    Attributes:
        layout: "awq", "gptq", "gptq_v2", "pack-quantized", "int-quantized" or "float-quantized".
        weights: What its linear layers become in a bundle.
        parts: Last parts of the names of a quantised layer's tensors; the first is there in every one.
    """

    layout: str
    weights: Weights
    parts: tuple[str, ...]

    def read(self, name: str, tensors: Tensors, *, shape: tuple[int, int]) -> PackedLinear:
        """One layer.

        Args:
            name: For messages.
            tensors: Its tensors by the last part of their names.
            shape: (in, out).

        Raises:
            UserError: See `ep_export.weights.layouts`; or another group than the config names.
        """
        linear = self._read(name, tensors, shape)
        if self.weights.group is not None and linear.group != self.weights.group:
            raise UserError(
                f"{name} has groups of {linear.group} inputs, its config says {self.weights.group}",
                hint="fetch the checkpoint again; config.json and shards do not belong together",
            )
        return linear

    def _read(self, name: str, tensors: Tensors, shape: tuple[int, int]) -> PackedLinear:
        if self.layout == "awq":
            return from_awq(name, tensors, shape=shape)
        if self.layout.startswith("gptq"):
            return from_gptq(name, tensors, shape=shape, zero_offset=int(self.layout == "gptq"))
        if self.layout == "pack-quantized":
            return from_pack_quantized(name, tensors, shape=shape)
        return from_channels(name, tensors, shape=shape, kind=self.weights.kind)


def read_published(config: Any, *, source: str) -> Published:
    """The layout that a `quantization_config` names.

    Args:
        config: The object in config.json.
        source: Of the model, for messages.

    Raises:
        UserError: A method, number of bits, group or version that is not read; says the way out.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{source} has a quantization_config that is no object", hint=_WAY_OUT)
    method = str(config.get("quant_method", "")).lower()
    if method in _REFUSED:
        raise UserError(f"{source} is quantized with {method}: {_REFUSED[method]}", hint=_WAY_OUT)
    if method == "awq":
        return _awq(config, source)
    if method == "gptq":
        return _gptq(config, source)
    if method == "compressed-tensors":
        return _compressed_tensors(config, source)
    raise UserError(
        f"{source} is quantized with {method or 'a method it does not name'}, which is not read",
        hint=f"{near_matches(method, _READ)}; {_WAY_OUT}",
    )


def _awq(config: Mapping[str, Any], source: str) -> Published:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UserError(f"{source} is packed by AWQ's {version} version, expected gemm", hint=_WAY_OUT)
    group = _group(config, source, "group_size")
    return Published("awq", _int4(config, source, group, "awq"), ("qweight", "qzeros", "scales"))


def _gptq(config: Mapping[str, Any], source: str) -> Published:
    version = str(config.get("checkpoint_format", "gptq")).lower()
    if version not in {"gptq", "gptq_v2"}:
        raise UserError(
            f"{source} is packed in GPTQ's format {version}, expected gptq or gptq_v2", hint=_WAY_OUT
        )
    group = _group(config, source, "group_size")
    return Published(version, _int4(config, source, group, version), ("qweight", "qzeros", "scales", "g_idx"))


def _int4(config: Mapping[str, Any], source: str, group: int | None, rounding: str) -> Weights:
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise UserError(f"{source} is quantized to {bits} bits by {rounding}, expected 4", hint=_WAY_OUT)
    return Weights(WeightKind.INT4, group, rounding)


def _compressed_tensors(config: Mapping[str, Any], source: str) -> Published:
    groups = config.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [s.get("weights") if isinstance(s, Mapping) else None for s in schemes]
    if not weights or not all(isinstance(w, Mapping) and w == weights[0] for w in weights):
        raise UserError(f"{source} quantizes its layers in several ways, expected one", hint=_WAY_OUT)
    scheme: Mapping[str, Any] = weights[0] or {}
    layout, bits, kind = str(config.get("format", "")), scheme.get("num_bits"), scheme.get("type")
    if layout not in _CT_FORMATS:
        raise UserError(
            f"{source} is packed in the format {layout or 'none'} of compressed-tensors, expected "
            f"{', '.join(_CT_FORMATS)}",
            hint=_WAY_OUT,
        )
    if layout == "pack-quantized" and (bits, kind) == (4, "int"):
        group = _group(scheme, source, "group_size") if scheme.get("strategy") == "group" else None
        parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
        return Published(layout, Weights(WeightKind.INT4, group, layout), parts)
    stored = {(8, "int"): WeightKind.INT8, (8, "float"): WeightKind.FP8}.get((bits or 0, kind or ""))
    if layout != "pack-quantized" and stored is not None:
        if scheme.get("strategy") not in {"channel", "tensor"}:
            raise UserError(
                f"{source} has 8-bit weights scaled by {scheme.get('strategy')}, expected channel or tensor",
                hint=_WAY_OUT,
            )
        name = "int-quantized" if stored is WeightKind.INT8 else "float-quantized"
        parts = ("weight_scale", "weight", "weight_zero_point", "input_scale", "input_zero_point")
        return Published(name, Weights(stored, None, name), parts)
    raise UserError(
        f"{source} is quantized to {kind} of {bits} bits in the format {layout}, which is not read",
        hint=_WAY_OUT,
    )


def _group(config: Mapping[str, Any], source: str, field: str) -> int | None:
    """Inputs that share a scale; None for a whole column."""
    group = config.get(field, config.get("q_group_size"))
    if group == -1:
        return None
    if not isinstance(group, int) or isinstance(group, bool) or group not in {16, 32, 64, 128, 256}:
        raise UserError(
            f"{source} has quantization groups of {group!r}, expected 16, 32, 64, 128, 256 or -1",
            hint=_WAY_OUT,
        )
    return group


def layer_and_part(name: str, parts: tuple[str, ...]) -> tuple[str, str] | None:
    """(layer, part) of a tensor that belongs to a quantised layer, else None."""
    found = re.fullmatch(rf"(.+)\.({'|'.join(map(re.escape, parts))})", name)
    return (found[1], found[2]) if found else None

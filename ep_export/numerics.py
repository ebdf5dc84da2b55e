"""Number types of the project, in one table; what graphs compute in and what weights are stored in.

The two are different things: a bundle may compute in float16 and store its weights in 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ep_export.errors import UsageError

__all__ = [
    "AS_THEY_ARE",
    "DEFAULT_GROUP",
    "GROUPS",
    "TYPES",
    "NumberType",
    "Numerics",
    "RoundingCost",
    "WeightKind",
    "Weights",
    "rounded_to",
]


@dataclass(frozen=True)
class NumberType:
    """One number type under all its names.

    Attributes:
        name: As PyTorch and NumPy (or ml_dtypes) have it.
        onnx: In ONNX's enumeration of data types.
        bits: Of one value.
        safetensors: In a shard's header; None where the format has no such type.
        tensorrt: In TensorRT's enumeration; None where it has none.
        roundoff: Unit roundoff: half the distance from 1 to the next number; 0 for integers.
    """

    name: str
    onnx: str
    bits: int
    safetensors: str | None = None
    tensorrt: str | None = None
    roundoff: float = 0.0


TYPES: dict[str, NumberType] = {
    kind.name: kind
    for kind in (
        NumberType("float64", "DOUBLE", 64, "F64", None, 2.0**-53),
        NumberType("float32", "FLOAT", 32, "F32", "FLOAT", 2.0**-24),
        NumberType("float16", "FLOAT16", 16, "F16", "HALF", 2.0**-11),
        NumberType("bfloat16", "BFLOAT16", 16, "BF16", "BF16", 2.0**-8),
        NumberType("float8_e4m3fn", "FLOAT8E4M3FN", 8, "F8_E4M3", "FP8", 2.0**-4),
        NumberType("float8_e5m2", "FLOAT8E5M2", 8, "F8_E5M2", None, 2.0**-3),
        NumberType("int64", "INT64", 64, "I64", "INT64"),
        NumberType("int32", "INT32", 32, "I32", "INT32"),
        NumberType("int16", "INT16", 16, "I16"),
        NumberType("int8", "INT8", 8, "I8", "INT8"),
        NumberType("uint8", "UINT8", 8, "U8", "UINT8"),
        NumberType("int4", "INT4", 4, None, "INT4"),
        NumberType("bool", "BOOL", 8, "BOOL", "BOOL"),
    )
}
"""By name."""

GROUPS = (32, 64, 128)
"""Inputs that may share a scale: powers of two, as ONNX Runtime's kernels want them."""


DEFAULT_GROUP = 128
"""What published 4-bit checkpoints use, and what every compiler takes."""


class WeightKind(str, Enum):
    """What linear layers are stored in."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


@dataclass(frozen=True)
class Weights:
    """How linear layers are stored.

    Attributes:
        kind: The type of the decoder's.
        group: Inputs that share a scale; None where a scale serves a whole output (int8, fp8).
        rounding: "nearest", "gptq", or the layout of the published checkpoint they were read from.
        vision: The type of those in the vision encoder's blocks, rounded to the nearest; None: as the
            checkpoint has them.
    """

    kind: WeightKind
    group: int | None
    rounding: str
    vision: WeightKind | None = None


AS_THEY_ARE = "none"
"""Of `rounded_to`: weights stay as the checkpoint has them."""


def rounded_to(kind: str, group: int = DEFAULT_GROUP, vision: str = AS_THEY_ARE) -> Weights | None:
    """What weights become, as people say it.

    Args:
        kind: Of the decoder: "none" or a `WeightKind`.
        group: For int4.
        vision: Of the vision encoder: "none" or "int8".

    Raises:
        UsageError: There is no such kind, or the vision encoder alone is to be rounded.
    """
    for given, known in ((kind, [each.value for each in WeightKind]), (vision, [WeightKind.INT8.value])):
        if given not in {AS_THEY_ARE, *known}:
            hint = f"one of {AS_THEY_ARE}, {', '.join(known)}"
            raise UsageError(f"there are no {given} weights", hint=hint)
    if kind == AS_THEY_ARE:
        if vision != AS_THEY_ARE:
            raise UsageError(
                f"{vision} weights of the vision encoder go with those of the decoder",
                hint="add --weights int8: the decoder has most of the weights",
            )
        return None
    stored = WeightKind(kind)
    return Weights(
        stored,
        group if stored is WeightKind.INT4 else None,
        "nearest",
        None if vision == AS_THEY_ARE else WeightKind(vision),
    )


@dataclass(frozen=True)
class Numerics:
    """What a bundle computes in, and what its decoder's weights are stored in.

    Attributes:
        compute: "fp32", "fp16" or "bf16".
        weights: None where they are stored as the checkpoint has them.
    """

    compute: str
    weights: Weights | None = None


@dataclass(frozen=True)
class RoundingCost:
    """How far a variant of the model is from the unquantised, unpruned one.

    Attributes:
        variant: "quantised", "pruned" or "quantised and pruned".
        kl: Mean KL over the positions of its own answers, nats.
        agreement: Share of these positions with the same top token.
        positions: How many there were.
    """

    variant: str
    kl: float
    agreement: float
    positions: int

"""Where quantised layers come from: rounded here, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ep_export.numerics import Weights
from ep_export.safetensors_index import TensorRef, map_tensor
from ep_export.weights.packed import PackedLinear
from ep_export.weights.rounding import round_nearest

__all__ = ["Packing", "nearest", "read_weight", "scale_type"]


@dataclass(frozen=True)
class Packing:
    """How the decoder's linear layers are quantised.

    Attributes:
        weights: What they become.
        layers: (names of weights in the Hugging Face model) -> each name with its layer, in any order.
    """

    weights: Weights
    layers: Callable[[Sequence[str]], Iterator[tuple[str, PackedLinear]]]


def nearest(tensors: Mapping[str, TensorRef], weights: Weights, *, compute: str) -> Packing:
    """Round the checkpoint's own weights without data.

    Args:
        tensors: Of an unquantised checkpoint, by name of the weight.
        weights: Kind and group.
        compute: What graphs compute in: "fp32", "fp16" or "bf16".
    """

    def layers(names: Sequence[str]) -> Iterator[tuple[str, PackedLinear]]:
        for name in names:
            weight = read_weight(tensors[name])
            yield name, round_nearest(weight, weights, scale_type=scale_type(compute), name=name)

    return Packing(weights, layers)


def scale_type(compute: str) -> str:
    """What scales are rounded to, so that graphs hold them exactly."""
    return "bfloat16" if compute == "bf16" else "float16"


def read_weight(ref: TensorRef) -> NDArray[Any]:
    """A linear layer's weight as W [in, out], a view of the mapped file, of any float type."""
    return map_tensor(ref).T

"""Bytes of a model's weights, part by part, from the numbers of its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.numerics import WeightKind, Weights

if TYPE_CHECKING:
    from ep_export.dims import DecoderDims
    from ep_export.vision_flops import VisionTower

__all__ = ["WeightSizes", "layer_parameters", "table_parameters", "weight_sizes"]

_BITS = {WeightKind.INT4: 4, WeightKind.INT8: 8, WeightKind.FP8: 8}


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a model's weights; norms and biases, thousandths of them, are left out.

    Attributes:
        vision: Vision encoder and projector; both encoders where videos have one of their own.
        layer: One layer of the decoder, scales included.
        layers: How many there are.
        lm_head: The product with the vocabulary.
        embedding: The table that token ids are looked up in, row by row on the host.
        shared: Whether lm_head and embedding are one tensor.
    """

    vision: int
    layer: int
    layers: int
    lm_head: int
    embedding: int
    shared: bool

    @property
    def computing(self) -> int:
        """What is multiplied with, and loaded for it: all but the embedding table."""
        return self.vision + self.layers * self.layer + self.lm_head

    @property
    def stored(self) -> int:
        """On disk: a tensor that serves twice is there once."""
        return self.computing + (0 if self.shared else self.embedding)


def weight_sizes(
    dims: DecoderDims,
    tower: VisionTower | None,
    *,
    number_bytes: int,
    weights: Weights | None,
    tied: bool,
) -> WeightSizes:
    """Sizes of a model.

    Args:
        dims: The decoder.
        tower: The vision encoder; None leaves it out.
        number_bytes: Of a number that is not quantised.
        weights: What linear layers are stored in; lm_head has 8 bits beside integers. None: as the rest.
        tied: Whether lm_head is the embedding table.
    """
    layer = layer_parameters(dims)
    layer_bytes = number_bytes * layer
    integers = weights is not None and weights.kind is not WeightKind.FP8
    if weights is not None:
        scales = layer * number_bytes // weights.group if weights.group else 0
        layer_bytes = layer * _BITS[weights.kind] // 8 + scales
    rounded_vision = weights is not None and weights.vision is not None
    return WeightSizes(
        vision=(1 if rounded_vision else number_bytes) * tower.parameters if tower else 0,
        layer=layer_bytes,
        layers=dims.layers,
        lm_head=table_parameters(dims) * (1 if integers else number_bytes),
        embedding=table_parameters(dims) * number_bytes,
        shared=tied and not integers,
    )


def layer_parameters(dims: DecoderDims) -> int:
    """Matrices of one decoder layer; norms and biases are thousandths of them."""
    attention = 2 * dims.hidden_size * dims.head_dim * (dims.heads + dims.kv_heads)
    return attention + 3 * dims.hidden_size * dims.ffn_size


def table_parameters(dims: DecoderDims) -> int:
    """Of the embedding table, and of lm_head."""
    return dims.vocab_size * dims.hidden_size

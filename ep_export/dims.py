"""The numbers of a model that the plan, the exporter and the runtime share. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DecoderDims"]


@dataclass(frozen=True)
class DecoderDims:
    """Shape of a language decoder.

    Attributes:
        layers: L.
        hidden_size: d.
        heads: H, query heads.
        kv_heads: Key/value heads; equals `heads` for multi-head attention.
        head_dim: D.
        ffn_size: m, width of the gated feed-forward network.
        vocab_size: Rows of the embedding table.
        max_positions: Longest prompt plus answer the checkpoint was made for, in tokens.
        position_axes: A, leading size of position_ids: 3 for mRoPE (time, height, width), else 1.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    position_axes: int

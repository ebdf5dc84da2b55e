"""The vision encoder: stem, one stamp a block, merger. What it computes is the family's `VisionTrace`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ep_export.dims import DecoderDims
from ep_export.export.decoder import Names, weight_names
from ep_export.export.stamp import IR_DTYPES, GraphBuilder
from ep_export.export.trace import Part, Piece, run_on_meta
from ep_export.families.base import VisionTrace

__all__ = ["VisionPieces", "build_vision", "name_vision_weights", "vision_parts"]


@dataclass(frozen=True)
class VisionPieces:
    """What was traced of a vision encoder; `*_weights` map names in a piece to names in the model."""

    stem: Piece
    blocks: tuple[Piece, ...]
    merger: Piece
    stem_weights: Mapping[str, str]
    block_weights: tuple[Mapping[str, str], ...]
    merger_weights: Mapping[str, str]


def vision_parts(vision: VisionTrace) -> list[Part]:
    """What to trace: stem, merger, and each distinct kind of block once.

    Args:
        vision: The encoder as the family cuts it; parameters on `meta` in the graph's type.
    """
    feeds = [torch.from_numpy(feed) for feed in vision.example_feeds.values()]
    axes = [list(vision.dynamic_axes.get(name, {})) for name in vision.example_feeds]
    between = run_on_meta(vision.stem, feeds)
    # Which axes vary after the stem: those that differ for a picture twice the size.
    larger = run_on_meta(vision.stem, [_twice(feed, which) for feed, which in zip(feeds, axes, strict=True)])
    varying = [
        [axis for axis, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if sizes[0] != sizes[1]]
        for a, b in zip(between, larger, strict=True)
    ]
    kinds = dict(zip(reversed(vision.kinds), reversed(vision.blocks), strict=True))
    return [
        Part(vision.stem, feeds, axes),
        Part(vision.merger, between, varying),
        *(Part(block, between, varying) for block in kinds.values()),
    ]


def name_vision_weights(vision: VisionTrace, pieces: Sequence[Piece], names: Names) -> VisionPieces:
    """Put the pieces of `vision_parts` together with the parameters of every block.

    Args:
        vision: As given to `vision_parts`.
        pieces: What became of its parts.
        names: The checkpoint's names of parameters.
    """
    stem, merger, *blocks = pieces
    kinds = dict(zip(dict.fromkeys(reversed(vision.kinds)), blocks, strict=True))
    return VisionPieces(
        stem=stem,
        blocks=tuple(kinds[kind] for kind in vision.kinds),
        merger=merger,
        stem_weights=weight_names(vision.stem, names),
        block_weights=tuple(weight_names(block, names) for block in vision.blocks),
        merger_weights=weight_names(vision.merger, names),
    )


def build_vision(builder: GraphBuilder, pieces: VisionPieces, vision: VisionTrace, dims: DecoderDims) -> None:
    """Feeds of one picture -> visual_embeds [N, d]."""
    inputs = []
    for name, feed in vision.example_feeds.items():
        symbols = vision.dynamic_axes.get(name, {})
        shape: list[int | str] = [symbols.get(axis, size) for axis, size in enumerate(feed.shape)]
        inputs.append(builder.input(name, IR_DTYPES[str(feed.dtype)], shape))
    hidden, *carry = builder.stamp(pieces.stem, inputs, pieces.stem_weights, "stem")
    for i, (piece, weights) in enumerate(zip(pieces.blocks, pieces.block_weights, strict=True)):
        (hidden,) = builder.stamp(piece, [hidden, *carry], weights, f"blocks.{i}")
    (embeds,) = builder.stamp(pieces.merger, [hidden, *carry], pieces.merger_weights, "merger")
    builder.output(embeds, "visual_embeds", builder.dtype, ("N", dims.hidden_size))


def _twice(feed: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    shape = [size * (2 if axis in axes else 1) for axis, size in enumerate(feed.shape)]
    return torch.empty(shape, dtype=feed.dtype, device="meta")

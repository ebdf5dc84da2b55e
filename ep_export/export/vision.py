"""The vision encoder: stem, blocks, merger. What they compute is the family's `VisionTrace`."""

from __future__ import annotations

import torch

from ep_export.dims import DecoderDims
from ep_export.export.graph_builder import GraphBuilder
from ep_export.export.recording import Size, Spec, Varying
from ep_export.export.tracing import trace
from ep_export.families.base import VisionTrace

__all__ = ["build_vision"]


def build_vision(graph: GraphBuilder, vision: VisionTrace, dims: DecoderDims) -> None:
    """Feeds of one picture -> visual_embeds [N, d]."""
    symbols = dict.fromkeys(name for axes in vision.dynamic_axes.values() for name in axes.values())
    # While recording, the second picture is larger, along every symbol by another factor.
    factors = {name: factor for factor, name in enumerate(symbols, 2)}
    inputs = []
    for name, feed in vision.example_feeds.items():
        axes = vision.dynamic_axes.get(name, {})
        shape = [axes.get(axis, size) for axis, size in enumerate(feed.shape)]
        sizes: list[Size] = [
            Varying(size, factors[axes[axis]] * size) if axis in axes else size
            for axis, size in enumerate(feed.shape)
        ]
        inputs.append(graph.input(name, shape, Spec(tuple(sizes), getattr(torch, str(feed.dtype)))))
    hidden, *carry = trace(graph, vision.stem, inputs, "stem")
    for i, block in enumerate(vision.blocks):
        (hidden,) = trace(graph, block, [hidden, *carry], f"blocks.{i}")
    (embeds,) = trace(graph, vision.merger, [hidden, *carry], "merger")
    graph.output(embeds, "visual_embeds", ("N", dims.hidden_size))

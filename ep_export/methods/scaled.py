"""The picture scaled down instead of pruned, where a smaller one has fewer tokens; see `measure.scaled`."""

from __future__ import annotations

from ep_export.methods.contract import Method, Place

__all__ = ["SCALED", "SCALED_FLOPS"]

_SOURCE = "plain rival, no paper"

SCALED = Method(
    key="scaled",
    title="Smaller picture",
    source=_SOURCE,
    idea="scales the picture down to the same average number of tokens, and prunes nothing",
    place=Place.PICTURE,
)

SCALED_FLOPS = Method(
    key="scaled-flops",
    title="Smaller picture, same first-token FLOPs",
    source=_SOURCE,
    idea="scales the picture down until the first token costs as much, vision encoder included",
    place=Place.PICTURE,
)

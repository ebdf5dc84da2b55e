"""Which combinations of method, layer and keep are compared, and what each costs.

The budget means the same for all: `keep` is the average over all layers, layers before K counted in full. A
method that prunes before the decoder has K = 0, and then the average is simply what it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ep_export.calibrate.candidates import candidate_layers
from ep_export.errors import UsageError
from ep_export.methods import Method, Place
from ep_export.plan import check_keep, check_layer, kept_tokens, layer_flops
from ep_export.policy import Keep

if TYPE_CHECKING:
    from ep_export.dims import DecoderDims

__all__ = ["Cost", "Spot", "Way", "auto_layers", "cost", "keeps_after", "spots", "ways_at"]

_MOST_LAYERS = 4
"""Layers a keep is tried at by default: enough to see a trend, few enough to wait for."""

_LEAST_LEFT = Fraction(1, 3)
"""By default only layers are tried that leave a third of the asked share or more to the layers after them: a
deeper cut leaves a handful of tokens, whatever chooses them."""


@dataclass(frozen=True)
class Spot:
    """A layer and a keep.

    Attributes:
        layer: K; 0 prunes before the decoder.
        keep: Average share over all layers.
    """

    layer: int
    keep: float


@dataclass(frozen=True)
class Way:
    """A method at a spot."""

    method: Method
    spot: Spot

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.method.key}/{self.spot.layer}/{self.spot.keep:g}"


@dataclass(frozen=True)
class Cost:
    """What one prompt costs.

    Attributes:
        flops: Prefill of the decoder layers (see `layer_flops`).
        kv_bytes: Cache of the visual tokens in float16.
    """

    flops: int
    kv_bytes: int


def keeps_after(spot: Spot, layers: int, visual_tokens: int) -> int:
    """Visual tokens that reach layer K.

    Raises:
        UsageError: The keep is impossible at this layer.
    """
    if spot.layer == 0:
        check_keep(Keep(ratio=spot.keep))
        return max(1, math.floor(Fraction(repr(spot.keep)) * visual_tokens))
    return kept_tokens(Keep(ratio=spot.keep), layers=layers, layer=spot.layer, visual_tokens=visual_tokens)


def auto_layers(keep: float, layers: int) -> tuple[int, ...]:
    """Layers that one keep is compared at when none are asked for: at most 4, spread evenly.

    Args:
        keep: Average share over all layers.
        layers: L.

    Raises:
        UsageError: No layer can meet the keep.
    """
    share = Fraction(repr(keep))
    able = candidate_layers(Keep(ratio=keep), layers, None)
    left = {layer: (layers * share - layer) / (layers - layer) for layer in able}
    possible = [layer for layer in able if left[layer] >= share * _LEAST_LEFT] or [able[0]]
    if len(possible) <= _MOST_LAYERS:
        return tuple(possible)
    picks = (round(i * (len(possible) - 1) / (_MOST_LAYERS - 1)) for i in range(_MOST_LAYERS))
    return tuple(possible[i] for i in picks)


def spots(
    keeps: Sequence[float],
    dims_layers: int,
    asked: Sequence[int] | None,
    methods: Sequence[Method],
    more: Mapping[float, int],
) -> tuple[tuple[Spot, ...], tuple[str, ...]]:
    """Every layer and keep that is compared, and a note for each that was asked for and is impossible.

    Args:
        keeps: Averages.
        dims_layers: L.
        asked: Layers; `auto_layers` when None.
        methods: K = 0 is added for those that can prune there.
        more: keep -> a layer that is compared besides, such as the recommended one.

    Raises:
        UsageError: A layer out of range, or a keep that is impossible at every layer.
    """
    before = [0] if any(m.place is Place.ANYWHERE and not m.chance for m in methods) else []
    found: list[Spot] = []
    notes: list[str] = []
    for keep in keeps:
        wanted = auto_layers(keep, dims_layers) if asked is None else asked
        extra = [more[keep]] if keep in more else []
        possible = len(found)
        for layer in sorted({*before, *wanted, *extra}):
            if layer:
                check_layer(layer, dims_layers)
            try:
                keeps_after(Spot(layer, keep), dims_layers, dims_layers)
            except UsageError as error:
                notes.append(f"keep {keep:g} at layer {layer} is left out: {error}")
                continue
            found.append(Spot(layer, keep))
        if all(spot.layer == 0 for spot in found[possible:]):
            raise UsageError(
                f"keep {keep:g} is impossible at every layer asked for",
                hint="give an earlier --layer, or a larger --keep",
            )
    return tuple(found), tuple(notes)


def ways_at(
    spot: Spot, methods: Sequence[Method], recommended: Mapping[float, tuple[int, Method]]
) -> list[Way]:
    """Every method that can prune at a spot, and the recommended policy where it belongs there."""
    found = [Way(m, spot) for m in methods if spot.layer > 0 or m.place is Place.ANYWHERE]
    layer, policy = recommended.get(spot.keep, (None, None))
    if policy is not None and layer == spot.layer:
        found.append(Way(policy, spot))
    return found


def cost(dims: DecoderDims, spot: Spot, visual_tokens: int, text_tokens: int) -> Cost:
    """What one prompt costs when pruned there; keep 1 at layer 0 is the unpruned model."""
    kept = keeps_after(spot, dims.layers, visual_tokens)
    before, after = spot.layer, dims.layers - spot.layer
    full, pruned = layer_flops(dims, visual_tokens + text_tokens), layer_flops(dims, kept + text_tokens)
    kv = 2 * dims.kv_heads * dims.head_dim * 2  # keys and values, 2 bytes each in float16
    return Cost(before * full + after * pruned, (before * visual_tokens + after * kept) * kv)

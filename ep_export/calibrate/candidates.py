"""Which ways of pruning are compared: every feasible layer and score, both ends, and random as the floor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.calibrate.record import RANDOM
from ep_export.entropy import select_tokens, token_scores
from ep_export.errors import UsageError
from ep_export.plan import check_layer, kept_tokens
from ep_export.policy import Keep, Scorer, Select

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RANDOM_DRAWS", "Way", "candidate_layers", "choices", "ways"]

RANDOM_DRAWS = 3
"""Random selections a picture and layer. The interval over pictures carries what noise is left."""


@dataclass(frozen=True)
class Way:
    """One way of pruning that is measured.

    Attributes:
        layer: K.
        scorer: A `Scorer` value or "random".
        select: Which end is kept; None for random.
    """

    layer: int
    scorer: str
    select: Select | None

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.layer}/{self.scorer}/{self.select.value if self.select else '-'}"


def candidate_layers(keep: Keep, layers: int, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Layers at which `keep` is possible: K / L <= keep.

    Args:
        keep: Average over layers; for a number of tokens all layers pass here, since it depends on the
            picture.
        layers: L.
        asked: Only these, ascending; all when None.

    Raises:
        UsageError: A layer asked for is out of range, or none is possible.
    """
    wanted = sorted(set(asked)) if asked is not None else range(1, layers)
    for layer in wanted:
        check_layer(layer, layers)
    if keep.tokens is not None:
        return tuple(wanted)
    possible = tuple(layer for layer in wanted if _possible(keep, layers, layer))
    if not possible:
        kept_tokens(
            keep, layers=layers, layer=min(wanted), visual_tokens=layers
        )  # raises, naming the smallest
        raise UsageError(f"no layer of {layers} can be pruned to keep {keep}")  # unreachable
    return possible


def ways(layers: Sequence[int]) -> tuple[Way, ...]:
    """Everything that is compared at these layers, the floor last at each."""
    return tuple(
        way
        for layer in layers
        for way in (
            *(Way(layer, scorer.value, select) for scorer in Scorer for select in Select),
            Way(layer, RANDOM, None),
        )
    )


def choices(
    way: Way, states: torch.Tensor, k: int, visual_index: torch.Tensor, *, seed: int, picture: str
) -> list[torch.Tensor]:
    """The kept sets that measure one way on one prompt: one, or several draws for random.

    Args:
        way: What is measured.
        states: [N, heads, head_dim] queries of layer K-1.
        k: How many are kept.
        visual_index: [N] int64.
        seed: Of the random draws, together with the layer and the picture, so that a resumed run draws alike.
        picture: The picture's hash.

    Returns:
        Tensors [k] int64 of prompt positions, ascending, on the device of `states`.
    """
    if way.scorer != RANDOM:
        scores = token_scores(states, Scorer(way.scorer))
        select = way.select or Select.HIGHEST
        return [select_tokens(scores, k, select=select, visual_index=visual_index)]
    digest = hashlib.sha256(f"{seed}/{way.layer}/{picture}".encode()).digest()
    generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    draws = [np.sort(generator.permutation(len(visual_index))[:k]) for _ in range(RANDOM_DRAWS)]
    return [visual_index[torch.from_numpy(draw).to(visual_index.device)] for draw in draws]


def _possible(keep: Keep, layers: int, layer: int) -> bool:
    try:
        kept_tokens(keep, layers=layers, layer=layer, visual_tokens=layers)
    except UsageError:
        return False
    return True

"""What a way of choosing visual tokens may look at, and what it must answer.

A method sees a `TokenView`: one prompt at the door of layer K, everything taken from the unpruned forward
pass up to there. It answers with k positions. How many that is, and what the model does with them, is
decided outside, alike for all: that is what makes methods comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

import numpy as np
import torch

__all__ = ["Choose", "LayerStates", "Method", "Place", "TokenView", "keep_best"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class LayerStates:
    """States of layer K-1 for every position of the prompt, in the model's number type.

    Attributes:
        queries: [S, heads, head_dim], q_proj output before rotary embedding.
        keys: [S, kv_heads, head_dim], before rotary embedding.
        values: [S, kv_heads, head_dim].
        rotate: (queries [S, heads, D], keys [S, kv_heads, D]) -> the same after the model's own rotary
            embedding.
        scale: Factor on the attention scores.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rotate: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    scale: float

    def attention_from(self, position: int) -> torch.Tensor:
        """What one position attends to: softmax over itself and all before it, mean over heads.

        Args:
            position: Of the prompt, 0 to S - 1.

        Returns:
            [position + 1] float32, sums to 1.
        """
        queries, keys = self.rotate(self.queries, self.keys)
        groups = queries.shape[1] // keys.shape[1]
        seen = keys[: position + 1].float().repeat_interleave(groups, dim=1)
        scores = torch.einsum("hd,shd->hs", queries[position].float(), seen) * self.scale
        return scores.softmax(dim=-1).mean(dim=0)


@dataclass(frozen=True)
class TokenView:
    """One prompt at the door of layer K.

    Attributes:
        visual_index: [N] int64, positions of the visual tokens, ascending.
        instruction: [T] int64, positions of the question's own words; the chat template's are left out.
        embeds: [S, d] what enters layer 0: visual embeddings at `visual_index`, word embeddings elsewhere.
        hidden: [S, d] what enters layer K; `embeds` when K is 0.
        final_norm: The decoder's last norm, for methods that compare normed states.
        states: Of layer K-1; None when K is 0.
        rng: For methods that draw.
        memo: What methods have computed at this layer already, shared between budgets; see `once`.
    """

    visual_index: torch.Tensor
    instruction: torch.Tensor
    embeds: torch.Tensor
    hidden: torch.Tensor
    final_norm: Callable[[torch.Tensor], torch.Tensor]
    states: LayerStates | None
    rng: np.random.Generator
    memo: dict[Hashable, object] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N."""
        return len(self.visual_index)

    @property
    def inside(self) -> LayerStates:
        """States of layer K-1.

        Raises:
            ValueError: K is 0: there is no layer before it.
        """
        if self.states is None:
            raise ValueError("this method needs the states of a decoder layer, so K must be at least 1")
        return self.states

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """The value made under `key`, made at the first call."""
        if key not in self.memo:
            self.memo[key] = make()
        found: _T = self.memo[key]  # type: ignore[assignment]  # a key belongs to one maker
        return found


Choose = Callable[[TokenView, int], torch.Tensor]
"""(view, k) -> [k] int64 kept positions of the prompt, ascending, each one of `visual_index`."""


class Place(str, Enum):
    """Where in the model a method can prune."""

    INSIDE = "inside"  # at the door of a layer K >= 1: it reads states of layer K-1
    ANYWHERE = "anywhere"  # also before the decoder, K = 0


@dataclass(frozen=True)
class Method:
    """A way of choosing visual tokens.

    Attributes:
        key: Short unique name.
        title: Name for people.
        source: Citation.
        idea: One sentence: what it keeps.
        choose: See `Choose`.
        place: Where it can prune.
        published_layer: The K its authors use by default; None where that depends on the model.
        ours: Whether a bundle of ep-export can prune this way.
        chance: Whether it draws, so that one run says little.
    """

    key: str
    title: str
    source: str
    idea: str
    choose: Choose
    place: Place = Place.INSIDE
    published_layer: int | None = None
    ours: bool = False
    chance: bool = False


def keep_best(view: TokenView, scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k visual tokens of highest score, ties to the lower index.

    Args:
        view: The prompt.
        scores: [N] float.
        k: How many, 0 to N.

    Returns:
        [k] int64 positions, ascending.
    """
    best = scores.argsort(descending=True, stable=True)[:k]
    return view.visual_index[best.sort().values]

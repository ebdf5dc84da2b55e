"""What a way of choosing visual tokens may look at, and what it must answer.

A method of ours is a chooser, whose exact form is in `ep_export.choosers`. A rival sees a `TokenView`: one
prompt as it arrives at a cut. Either answers with k positions. How many that is, and what the model does with
them, is decided outside, alike for all: that is what makes methods comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

import torch

from ep_export.choosers import LayerStates
from ep_export.policy import Chooser, Random

__all__ = [
    "Choose",
    "LayerStates",
    "Method",
    "Place",
    "StageCut",
    "Stages",
    "TokenView",
    "keep_best",
]

_T = TypeVar("_T")


@dataclass(frozen=True)
class TokenView:
    """One prompt as it arrives at a cut, before anything is dropped there. Positions are of that sequence.

    Attributes:
        visual_index: [N] int64, positions of the visual tokens, ascending.
        instruction: [T] int64, positions of the question's own words; the chat template's are left out.
        embeds: [S, d] what entered layer 0: visual embeddings at `visual_index`, word embeddings elsewhere.
        hidden: [S, d] what enters the cut's layer K; `embeds` when K is 0.
        final_norm: The decoder's last norm, for methods that compare normed states.
        states: Of layer K-1; None when K is 0.
        tower_attention: Says how much attention every visual token received in the vision tower, [N]; see
            `ep_export.measure.view.tower_attention`.
        memo: What methods have computed here already, shared between budgets; see `once`.
    """

    visual_index: torch.Tensor
    instruction: torch.Tensor
    embeds: torch.Tensor
    hidden: torch.Tensor
    final_norm: Callable[[torch.Tensor], torch.Tensor]
    states: LayerStates | None
    tower_attention: Callable[[], torch.Tensor]
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

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """What is computed under `key`, at the first call only."""
        if key not in self.memo:
            self.memo[key] = compute()
        value: _T = self.memo[key]  # type: ignore[assignment]  # a key belongs to one computation
        return value


Choose = Callable[[TokenView, int], torch.Tensor]
"""(view, k) -> [k] int64 kept positions, ascending, each one of `visual_index`."""


class Place(str, Enum):
    """Where in the model a method can prune."""

    INSIDE = "inside"  # at a layer K >= 1: it reads states of layer K-1
    ANYWHERE = "anywhere"  # also before the decoder, K = 0
    STAGES = "stages"  # at several layers of its own
    PICTURE = "picture"  # nowhere: the picture itself is made smaller


@dataclass(frozen=True)
class StageCut:
    """One stage of a method that has several.

    Attributes:
        layer: K.
        method: Key of what chooses there.
        share: Of the prompt's visual tokens that go on, before shares are scaled to the keep.
    """

    layer: int
    method: str
    share: float


Stages = Callable[[int, float], tuple[StageCut, ...]]
"""(layers of the model, keep) -> stages in the order of their layers, at least one."""


@dataclass(frozen=True)
class Method:
    """A way of choosing visual tokens.

    Attributes:
        key: Short unique name; of a method of ours the policy's.
        title: Name for people.
        source: Citation.
        idea: One sentence: what it keeps.
        place: Where it can prune.
        chooser: What a bundle of ep-export would prune by; None for a rival.
        choose: Of a rival, see `Choose`; None for a method of ours.
        published_layer: The K its authors use by default; None where that depends on the model.
        stages: Where a method of several stages drops tokens.
        chooser_stages: Whether what chooses at them is all ours, so that a bundle can prune this way.
        reads_tower: Whether it reads `TokenView.tower_attention`, which not every family has.
    """

    key: str
    title: str
    source: str
    idea: str
    place: Place = Place.INSIDE
    chooser: Chooser | None = None
    choose: Choose | None = None
    published_layer: int | None = None
    stages: Stages | None = None
    chooser_stages: bool = False
    reads_tower: bool = False

    @property
    def ours(self) -> bool:
        """Whether a bundle can prune this way."""
        return self.chooser is not None or self.chooser_stages

    @property
    def chance(self) -> bool:
        """Whether it draws, so that one run says little."""
        return isinstance(self.chooser, Random)


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

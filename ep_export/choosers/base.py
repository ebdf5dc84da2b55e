"""The contract of a chooser: which of a cut's visual tokens stay, three times.

Every file of this folder gives one chooser of `ep_export.policy` its exact form (float64, the oracle's and
the rival methods'), the judgement of another runtime's choice (near-ties replayed), and its ONNX body.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

from ep_export.policy import Source

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ep_export.dims import DecoderDims
    from ep_export.graph import Nodes

__all__ = [
    "Choice",
    "ChooserForm",
    "CutTokens",
    "KeptDifference",
    "LayerStates",
    "PruneInputs",
    "state_heads",
]

_C = TypeVar("_C")


@dataclass(frozen=True)
class CutTokens:
    """The visual tokens that arrive at a cut.

    Attributes:
        hidden: [N, d] what enters the cut's layer; at layer 0 the visual embeddings.
        states: [N, heads, head_dim] what a chooser scores: projections or attention of the layer before, or
            `hidden` seen as heads; None where the chooser reads none.
        visual_index: [N] int64, ascending positions in the sequence that arrives. Consecutive positions
            belong to one picture.
    """

    hidden: torch.Tensor
    states: torch.Tensor | None
    visual_index: torch.Tensor


@dataclass(frozen=True)
class LayerStates:
    """States of layer K-1 for every position that arrives at layer K, in the model's number type.

    Attributes:
        queries: [S, heads, head_dim], q_proj output before rotary embedding.
        keys: [S, kv_heads, head_dim], before rotary embedding.
        rotate: (queries [S, heads, D], keys [S, kv_heads, D]) -> the same after the model's own rotary
            embedding.
        scale: Factor on the attention scores.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    rotate: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    scale: float

    def attention_from(self, position: int) -> torch.Tensor:
        """What one position attends to: softmax over itself and all before it, mean over heads.

        Args:
            position: Of the sequence, 0 to S - 1.

        Returns:
            [position + 1] float32, sums to 1.
        """
        queries, keys = self.rotate(self.queries, self.keys)
        groups = queries.shape[1] // keys.shape[1]
        seen = keys[: position + 1].float().repeat_interleave(groups, dim=1)
        scores = (seen * queries[position].float()).sum(dim=-1).T * self.scale
        return scores.softmax(dim=-1).mean(dim=0)

    @property
    def attention(self) -> torch.Tensor:
        """What `Source.ATTENTION` is: `attention_from` the last position as multiples of an even share, 1/S.

        So its scores are of the size of entropies however long the prompt is, and float16 holds them.

        Returns:
            [S, 1] float32, its mean is 1.
        """
        length = len(self.queries)
        return length * self.attention_from(length - 1)[:, None]


def state_heads(source: Source, dims: DecoderDims) -> int:
    """Heads of the states that a source is."""
    if source is Source.ATTENTION:
        return 1
    return dims.kv_heads if source in {Source.KEY, Source.VALUE} else dims.heads


@dataclass(frozen=True)
class Choice:
    """What stays.

    Attributes:
        kept: [k] int64, ascending positions, each one of `CutTokens.visual_index`.
        scores: [N] float64, what the choice rests on; None for `Nothing`.
    """

    kept: torch.Tensor
    scores: torch.Tensor | None


class KeptDifference(str, Enum):
    """How a kept set differs from the exact one."""

    EQUAL = "equal"
    NEAR_TIE = "near_tie"  # only by choices between tokens closer together than the tolerance
    DIFFERENT = "different"


@dataclass(frozen=True)
class PruneInputs:
    """Values of a prune graph that a body may read.

    Attributes:
        states: [1, S, heads, head_dim], any float type; None where the chooser reads none.
        hidden: [1, S, d], any float type.
        visual_index: [N] int64.
        keep_slots: [k] int64, of which only the length is read; None for `Nothing`.
        heads: Heads of `states`.
        degree: Of the entropy series.
    """

    states: ir.Value | None
    hidden: ir.Value
    visual_index: ir.Value
    keep_slots: ir.Value | None
    heads: int
    degree: int

    def scored(self) -> ir.Value:
        """The states.

        Raises:
            ValueError: The graph has none.
        """
        if self.states is None:
            raise ValueError("this chooser scores states, and there are none")
        return self.states

    def count(self, nodes: Nodes) -> ir.Value:
        """Append k: [1] int64.

        Raises:
            ValueError: The graph does not say how many stay.
        """
        if self.keep_slots is None:
            raise ValueError("this chooser keeps tokens, and there are no keep_slots")
        return nodes.length(self.keep_slots)


class ChooserForm(ABC, Generic[_C]):
    """One chooser; see the module."""

    @abstractmethod
    def choose(self, chooser: _C, tokens: CutTokens, k: int) -> Choice:
        """The exact choice.

        Args:
            chooser: Its settings.
            tokens: On any device, in any float type; computed in float64.
            k: How many stay, 1 to N (0 for `Nothing`).
        """

    @abstractmethod
    def difference(
        self, chooser: _C, tokens: CutTokens, kept: torch.Tensor, k: int, *, tolerance: float
    ) -> KeptDifference:
        """Classify another runtime's choice.

        Args:
            chooser: Its settings.
            tokens: As for `choose`.
            kept: [k] positions the other kept.
            k: How many stay.
            tolerance: How far apart two exact scores (or distances) may be and still change places.
        """

    @abstractmethod
    def body(self, nodes: Nodes, chooser: _C, inputs: PruneInputs) -> tuple[ir.Value, ir.Value | None]:
        """Append the choice in standard operators.

        Returns:
            [k] int64 positions that stay, each one of `visual_index`, in any order; and [N] float32 scores
            (None for `Nothing`).
        """

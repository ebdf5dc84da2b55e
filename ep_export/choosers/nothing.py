"""Keep no visual token."""
# ruff: noqa: ARG002 - a form need not look at everything it is given

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ep_export.choosers.base import Choice, ChooserForm, CutTokens, KeptDifference, PruneInputs
from ep_export.policy import Nothing

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ep_export.graph import Nodes

__all__ = ["NothingForm"]


class NothingForm(ChooserForm[Nothing]):
    """k = 0; there is nothing to score."""

    def choose(self, chooser: Nothing, tokens: CutTokens, k: int) -> Choice:
        """No position.

        Raises:
            ValueError: k is not 0.
        """
        if k:
            raise ValueError(f"cannot keep {k} tokens with {chooser.name}")
        return Choice(tokens.visual_index[:0], None)

    def difference(
        self, chooser: Nothing, tokens: CutTokens, kept: torch.Tensor, k: int, *, tolerance: float
    ) -> KeptDifference:
        """Equal when nothing is kept."""
        return KeptDifference.DIFFERENT if k or len(kept) else KeptDifference.EQUAL

    def body(self, nodes: Nodes, chooser: Nothing, inputs: PruneInputs) -> tuple[ir.Value, None]:
        """No position, and no scores."""
        return nodes.number([], np.int64), None

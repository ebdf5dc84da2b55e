"""Which of a cut's visual tokens stay: one file a chooser.

Each has its exact form, its judgement of another runtime's choice, and its ONNX body. `component.build_prune`
makes a prune component of any of them; it is imported where onnx_ir is at hand.
"""

from __future__ import annotations

from typing import Any

import torch

from ep_export.choosers.base import (
    Choice,
    ChooserForm,
    CutTokens,
    KeptDifference,
    LayerStates,
    PruneInputs,
    state_heads,
)
from ep_export.choosers.coverage import CoverageForm
from ep_export.choosers.max_min import MaxMinForm
from ep_export.choosers.nothing import NothingForm
from ep_export.choosers.random_draw import RandomForm
from ep_export.choosers.top_k import EXACT_TOLERANCE, TopKForm
from ep_export.policy import Chooser, Kind

__all__ = [
    "EXACT_TOLERANCE",
    "Choice",
    "ChooserForm",
    "CutTokens",
    "KeptDifference",
    "LayerStates",
    "PruneInputs",
    "choose",
    "difference",
    "form_of",
    "state_heads",
]

_FORMS: dict[Kind, ChooserForm[Any]] = {
    Kind.TOP_K: TopKForm(),
    Kind.MAX_MIN: MaxMinForm(),
    Kind.COVERAGE: CoverageForm(),
    Kind.RANDOM: RandomForm(),
    Kind.NOTHING: NothingForm(),
}


def form_of(chooser: Chooser) -> ChooserForm[Any]:
    """What computes a chooser."""
    return _FORMS[chooser.kind]


def choose(chooser: Chooser, tokens: CutTokens, k: int) -> Choice:
    """The exact choice, in float64.

    Args:
        chooser: Which tokens stay.
        tokens: The visual tokens that arrive at the cut.
        k: How many stay, 1 to N; 0 for `Nothing`.

    Raises:
        ValueError: Impossible k, or states that the chooser needs are missing.
    """
    return form_of(chooser).choose(chooser, tokens, k)


def difference(
    chooser: Chooser,
    tokens: CutTokens,
    kept: torch.Tensor,
    k: int,
    *,
    tolerance: float = EXACT_TOLERANCE,
) -> KeptDifference:
    """Classify another runtime's choice against the exact one.

    Args:
        chooser: Which tokens stay.
        tokens: The visual tokens that arrive at the cut.
        kept: [k] positions that the other kept.
        k: How many stay.
        tolerance: How far apart two exact scores (or distances) may be and still change places. The default
            is float32's; `ep_export.entropy.approximation_spread` for scores without eigenvalues.
    """
    return form_of(chooser).difference(chooser, tokens, kept, k, tolerance=tolerance)

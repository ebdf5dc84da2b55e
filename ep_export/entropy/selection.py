"""Which visual tokens stay, given their scores; and how two such choices differ.

Scores in NumPy or torch enter, and positions of the same kind leave.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.policy import Budget, Select

__all__ = ["EXACT_TOLERANCE", "KeptDifference", "kept_difference", "picture_of", "select_tokens"]

EXACT_TOLERANCE = 2e-6
"""Near-tie between two exact scorers: three times the 7e-7 that a float32 Gram costs against float64."""

_Array = TypeVar("_Array", torch.Tensor, NDArray[Any])


class KeptDifference(str, Enum):
    """How a kept set differs from the oracle's."""

    EQUAL = "equal"
    NEAR_TIE = "near_tie"  # only in tokens whose scores lie within the tolerance of the last one kept
    DIFFERENT = "different"


def select_tokens(
    scores: _Array, k: int, *, select: Select, visual_index: _Array, budget: Budget = Budget.JOINT
) -> _Array:
    """Positions of the k best tokens, in prompt order.

    Scores that are not finite rank last whichever end is kept; ties go to the lower index. With
    `per_picture`, pictures are maximal runs of consecutive positions: a token's rank r in its picture (best
    is 0) becomes (r + 0.5) / tokens of its picture, in float32, and the k smallest are kept.

    Args:
        scores: [visual_tokens] float, torch or NumPy.
        k: How many to keep, 0 to visual_tokens.
        select: Which end is kept.
        visual_index: [visual_tokens] int64, ascending positions in the prompt, same kind as `scores`.
        budget: Joint or per picture.

    Returns:
        [k] int64 positions, ascending, of the same kind (and device) as `scores`.

    Raises:
        ValueError: k or the lengths do not fit.
    """
    values, index = _numpy(scores), _numpy(visual_index)
    if values.shape != index.shape or not 0 <= k <= len(values):
        raise ValueError(f"cannot keep {k} of {len(values)} scores at {len(index)} positions")
    order = _best_first(values, select)
    if budget is Budget.PER_PICTURE:
        order = np.argsort(_share(order, picture_of(index)), kind="stable")
    kept = np.sort(index[order[:k]])
    if isinstance(scores, torch.Tensor):
        return torch.from_numpy(kept).to(scores.device)
    return kept


def picture_of(visual_index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the picture each visual token belongs to: maximal runs of consecutive positions.

    Args:
        visual_index: [visual_tokens] ascending.

    Returns:
        [visual_tokens] int64, starting at 0.
    """
    if not len(visual_index):
        return np.empty(0, dtype=np.int64)
    starts = np.diff(visual_index, prepend=visual_index[0]) > 1
    return np.cumsum(starts).astype(np.int64)


def kept_difference(
    scores: torch.Tensor | NDArray[Any],
    kept: torch.Tensor | NDArray[Any],
    other: torch.Tensor | NDArray[Any],
    k: int,
    *,
    visual_index: torch.Tensor | NDArray[Any],
    select: Select = Select.HIGHEST,
    budget: Budget = Budget.JOINT,
    tolerance: float = EXACT_TOLERANCE,
) -> KeptDifference:
    """Classify how `other` differs from the oracle's `kept`.

    A difference is a near-tie when every token kept by only one of them scores within `tolerance` of the
    k-th best score: of the whole prompt, or of its picture where the budget is per picture (there the number
    kept of each picture does not depend on scores, so it must agree).

    Args:
        scores: [visual_tokens] the oracle's scores.
        kept: [k] positions the oracle keeps.
        other: [k] positions to compare.
        k: How many are kept.
        visual_index: [visual_tokens] ascending positions.
        select: Which end is kept.
        budget: Joint or per picture.
        tolerance: In the unit of the scores; `approximation_spread` for scores without eigenvalues.
    """
    values, index = _numpy(scores).astype(np.float64), _numpy(visual_index)
    ours, theirs = np.isin(index, _numpy(kept)), np.isin(index, _numpy(other))
    if not ours.sum() == theirs.sum() == k == len(_numpy(other)):
        return KeptDifference.DIFFERENT  # another number, a position twice, or one that is no visual token
    if np.array_equal(ours, theirs):
        return KeptDifference.EQUAL
    pictures = picture_of(index) if budget is Budget.PER_PICTURE else np.zeros(len(index), dtype=np.int64)
    for picture in np.unique(pictures):
        inside = pictures == picture
        if not _near_tie(values[inside], ours[inside], theirs[inside], select, tolerance):
            return KeptDifference.DIFFERENT
    return KeptDifference.NEAR_TIE


def _near_tie(
    scores: NDArray[np.float64],
    ours: NDArray[np.bool_],
    theirs: NDArray[np.bool_],
    select: Select,
    tolerance: float,
) -> bool:
    count = int(ours.sum())
    if count != theirs.sum():
        return False
    if not count:
        return True
    edge = scores[_best_first(scores, select)[count - 1]]
    return bool(np.all(np.abs(scores[ours != theirs] - edge) < tolerance))


def _best_first(scores: NDArray[Any], select: Select) -> NDArray[np.int64]:
    """Token numbers from best to worst, ties by number, non-finite ones last."""
    key = -scores if select is Select.HIGHEST else scores
    return np.argsort(np.where(np.isfinite(scores), key, np.inf), kind="stable")


def _share(order: NDArray[np.int64], pictures: NDArray[np.int64]) -> NDArray[np.float32]:
    """(rank within its picture + 0.5) / tokens of its picture, for every token."""
    share = np.empty(len(order), dtype=np.float32)
    for picture in np.unique(pictures):
        ranked = order[pictures[order] == picture]
        share[ranked] = (np.arange(len(ranked), dtype=np.float32) + np.float32(0.5)) / np.float32(len(ranked))
    return share


def _numpy(array: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)

"""Is a choice the exact one? `ep_export.choosers` judges kept sets; here is how near a tie may be."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.adaptive import bounds, own_tokens
from ep_export.choosers import EXACT_TOLERANCE, CutTokens, KeptDifference, choose, difference
from ep_export.choosers.coverage import importance
from ep_export.choosers.greedy import FIRST_SCORE
from ep_export.dims import DecoderDims
from ep_export.entropy import approximation_spread, token_scores
from ep_export.policy import Chooser, Coverage, Keep, MaxMin, Schedule, TopK
from ep_export.validate.comparison import Comparison
from ep_export.validate.report import Verdict
from ep_export.validate.tolerance import float32_tolerance, score_tolerance

__all__ = ["choice_tolerance", "compare_choice", "compare_own_tokens", "graph_spread"]

_VERDICTS = {
    KeptDifference.EQUAL: Verdict.PASS,
    KeptDifference.NEAR_TIE: Verdict.AMBIGUOUS,
    KeptDifference.DIFFERENT: Verdict.FAIL,
}
_TYPICAL = 1 / 8  # of a float32 tolerance: what states really differ by, for the sensitivity of scores
_LARGEST_GAP = 1e3
"""Beyond every difference of scores: entropies are below 10, distances below 2."""
_SMALLEST_GAP = 1e-12
_SAMPLED_ROWS = 64
"""Tokens whose distances to all others are looked at: their largest shift stands for everybody's."""


def compare_choice(
    where: str, chooser: Chooser, tokens: CutTokens, kept: NDArray[np.int64], k: int, tolerance: float
) -> Comparison:
    """A kept set against the exact one: the error is the smallest tolerance that makes it a near-tie.

    Args:
        where: The case, for the report.
        chooser: Which tokens stay.
        tokens: What arrived at the cut, exactly.
        kept: [k] positions in the arriving sequence.
        k: How many stay.
        tolerance: How near a tie is a near-tie.
    """
    positions = torch.from_numpy(np.asarray(kept, dtype=np.int64))
    verdict = difference(chooser, tokens, positions, k, tolerance=tolerance)
    if verdict is KeptDifference.EQUAL:
        return Comparison(Verdict.PASS, 0.0, tolerance, 1.0, where)
    own = choose(chooser, tokens, k).kept
    count = int((~torch.isin(own, positions)).sum())
    gap = _gap(chooser, tokens, positions, k)
    note = (
        f"{count} of {k} kept tokens differ" if len(kept) == k else f"{len(kept)} tokens kept, expected {k}"
    )
    if math.isfinite(gap):
        note += f", by choices no further apart than {gap:.1e}"
    return Comparison(_VERDICTS[verdict], gap, tolerance, 1.0, where, note)


def compare_own_tokens(
    where: str,
    keep: Keep,
    schedule: Schedule,
    tokens: CutTokens,
    k: int,
    tolerance: float,
    *,
    layers: int,
) -> Comparison:
    """How many tokens a prompt keeps, where that follows from its scores, against the exact number.

    Args:
        where: The case, for the report.
        keep: With a threshold.
        schedule: Of one cut.
        tokens: What arrived at the cut, exactly.
        k: How many the bundle keeps.
        tolerance: How far a score may be from the threshold and still count on either side.
        layers: L.
    """
    size = {"layers": layers, "visual_tokens": len(tokens.visual_index)}
    _, most = bounds(keep, schedule, **size)
    scores = choose(schedule.cuts[0].chooser, tokens, most).scores
    if scores is None or keep.threshold is None:
        raise ValueError(f"{schedule} has no scores that decide how many tokens stay")
    exact, *shifted = (
        own_tokens(moved, scores.numpy(), schedule, **size)
        for moved in (keep, *(_moved(keep, side * tolerance) for side in (-1, 1)))
    )
    gap = float(abs(k - exact))
    if k == exact:
        return Comparison(Verdict.PASS, gap, 0.0, 1.0, where)
    tied = min(shifted) <= k <= max(shifted)
    note = f"{k} tokens kept, exactly {exact}" + (", by scores at the threshold" if tied else "")
    return Comparison(Verdict.AMBIGUOUS if tied else Verdict.FAIL, gap, 0.0, 1.0, where, note)


def _moved(keep: Keep, distance: float) -> Keep:
    if keep.threshold is None:
        return keep
    return replace(keep, threshold=replace(keep.threshold, value=keep.threshold.value + distance))


def choice_tolerance(
    dims: DecoderDims,
    chooser: Chooser,
    tokens: CutTokens,
    *,
    spread: float,
    layers: int,
    half: CutTokens | None = None,
) -> float:
    """How far apart two exact scores (or distances) may be and still change places in a graph.

    Args:
        dims: The decoder's dimensions.
        chooser: Which tokens stay.
        tokens: What the oracle saw arrive.
        spread: What scoring in the graph moves on the same tokens; see `graph_spread`.
        layers: Layers these tokens went through.
        half: The same by the oracle in the graphs' half type, if they have one.
    """
    relative = _TYPICAL * float32_tolerance(dims, layers).relative
    moved = [half] if half is not None else [_shaken(tokens, relative, seed) for seed in range(2)]
    return spread + 2 * max(_shift(chooser, tokens, other) for other in moved)


def graph_spread(
    chooser: Chooser, tokens: CutTokens, scores: NDArray[np.float32] | None, degree: int
) -> float:
    """How far a graph's scoring can move two of these tokens against each other.

    Args:
        chooser: Which tokens stay.
        tokens: What the graph was given.
        scores: [N] what the graph computed of them.
        degree: Degree of the entropy series.
    """
    if isinstance(chooser, TopK) and tokens.states is not None and scores is not None:
        exact = token_scores(tokens.states, chooser.scorer)
        return approximation_spread(exact, torch.from_numpy(scores)) + EXACT_TOLERANCE
    # scores that depend on what was chosen before: bounded, not measured
    return EXACT_TOLERANCE + 2 * score_tolerance(chooser, tokens, degree).absolute


def _gap(chooser: Chooser, tokens: CutTokens, kept: torch.Tensor, k: int) -> float:
    """The smallest tolerance at which this set is a near-tie, to 1%; infinite where none is."""

    def tied(tolerance: float) -> bool:
        verdict = difference(chooser, tokens, kept, k, tolerance=tolerance)
        return verdict is not KeptDifference.DIFFERENT

    if tied(_SMALLEST_GAP):
        return 0.0
    low, high = _SMALLEST_GAP, _LARGEST_GAP
    if not tied(high):
        return math.inf
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if tied(middle) else (middle, high)
    return high


def _shaken(tokens: CutTokens, relative: float, seed: int) -> CutTokens:
    """The tokens, rounded differently on their way."""
    generator = torch.Generator().manual_seed(seed)

    def shake(values: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        return values.double() + relative * values.double().abs().mean() * noise

    states = None if tokens.states is None else shake(tokens.states)
    return CutTokens(shake(tokens.hidden), states, tokens.visual_index)


def _shift(chooser: Chooser, tokens: CutTokens, moved: CutTokens) -> float:
    """How far what the chooser compares moves, at most."""
    if isinstance(chooser, TopK) and tokens.states is not None and moved.states is not None:
        before, after = (token_scores(each, chooser.scorer) for each in (tokens.states, moved.states))
    elif isinstance(chooser, Coverage):
        return _weighted_shift(chooser, tokens, moved)
    elif isinstance(chooser, MaxMin):
        before, after = (_distances(each.hidden) for each in (tokens, moved))
    else:
        return 0.0  # nothing that is computed is compared
    return _largest(after - before)


def _weighted_shift(chooser: Coverage, tokens: CutTokens, moved: CutTokens) -> float:
    """The same for importance times distance: what either moves, where the other is at its largest."""
    if tokens.states is None or moved.states is None:
        return 0.0
    before, after = (
        importance(token_scores(states, chooser.scorer), chooser) for states in (tokens.states, moved.states)
    )
    distances = _distances(moved.hidden) - _distances(tokens.hidden)
    return FIRST_SCORE * _largest(after - before) + _largest(distances)


def _largest(differences: torch.Tensor) -> float:
    apart = differences.abs()
    return float(apart[torch.isfinite(apart)].max()) if apart.numel() else 0.0


def _distances(hidden: torch.Tensor) -> torch.Tensor:
    """[rows, N] cosine distances of some tokens to all."""
    unit = torch.nn.functional.normalize(hidden.double(), dim=1)
    rows = torch.linspace(0, len(unit) - 1, min(len(unit), _SAMPLED_ROWS)).round().long()
    return 1 - unit[rows] @ unit.T

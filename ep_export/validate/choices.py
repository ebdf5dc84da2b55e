"""The stages that are about choosing tokens: the node's scores, the node's choice, the bundle's choice."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.bundle import Manifest
from ep_export.entropy import (
    EXACT_TOLERANCE,
    KeptDifference,
    approximation_spread,
    entropy_series,
    kept_difference,
    select_tokens,
    token_scores,
)
from ep_export.entropy.selection import picture_of
from ep_export.policy import Budget, Policy, Select
from ep_export.validate.comparison import Comparison, Finding, compare
from ep_export.validate.node_check import run_scores
from ep_export.validate.observe import Observation
from ep_export.validate.report import Verdict
from ep_export.validate.setting import Setting, to_numpy
from ep_export.validate.tolerance import EXACT, Tolerance, float32_tolerance, score_bound

__all__ = ["choice_tolerance", "find_kept", "find_node", "find_scores"]

_VERDICTS = {
    KeptDifference.EQUAL: Verdict.PASS,
    KeptDifference.NEAR_TIE: Verdict.AMBIGUOUS,
    KeptDifference.DIFFERENT: Verdict.FAIL,
}
_TYPICAL = 1 / 8  # of a float32 tolerance: what states really differ by, for the sensitivity of scores


def find_scores(setting: Setting, case: Observation) -> Finding:
    """The exported scores against float64 eigenvalues, on the oracle's own states."""
    if not case.has_pictures:
        return Finding("scores", (), "no picture")
    policy, degree = setting.manifest.policy, setting.manifest.degree
    states = to_numpy(case.free.states)
    exact = token_scores(torch.from_numpy(states), policy.scorer).numpy()
    bound, reason = score_bound(policy.scorer, states, entropy_series(degree))
    scores = run_scores(states, policy.scorer, degree)
    found = compare(case.question.name, scores, exact, Tolerance(0.0, bound, reason))
    return Finding("scores", (found,), reason)


def find_node(setting: Setting, case: Observation) -> Finding:
    """What the bundle's node keeps when it is given the oracle's own states."""
    reason = "near-tie: exact scores no further apart than the graph's own scoring errors on these tokens"
    if not case.has_pictures:
        return Finding("node", (), reason)
    states = to_numpy(case.free.states)
    length = case.prompt.input_ids.shape[1]
    kept = setting.node.kept_index(states, case.prompt.visual_index, length, case.k)
    visual = kept[np.isin(kept, case.prompt.visual_index)]
    spread = _spread(setting.manifest, states)
    return Finding("node", (_choice(setting, case, visual, spread),), reason)


def find_kept(setting: Setting, case: Observation) -> Finding:
    """What the bundle keeps, run from the pictures on."""
    reason = (
        "near-tie: exact scores no further apart than the graph's scoring errors plus what rounding of the "
        "states moves these scores"
    )
    if not case.has_pictures:
        everything = np.arange(case.prompt.input_ids.shape[1])
        return Finding("kept", (compare(case.question.name, case.got.kept_index, everything, EXACT),), reason)
    states = to_numpy(case.free.states)
    half = to_numpy(case.half.states) if case.half is not None else None
    layers = setting.vision_layers + setting.manifest.policy.layer
    tolerance = choice_tolerance(setting.manifest, states, layers=layers, half_states=half)
    if case.forced:
        found = _choice(setting, case, case.kept_visual, tolerance)
    else:
        note = "text tokens are missing, or positions are out of order"
        found = Comparison(Verdict.FAIL, math.inf, tolerance, 1.0, case.question.name, note)
    return Finding("kept", (found,), reason)


def _choice(setting: Setting, case: Observation, kept: NDArray[np.int64], tolerance: float) -> Comparison:
    """A kept set against the oracle's: the error is how far exchanged tokens score from the last one kept."""
    policy = setting.manifest.policy
    states = torch.from_numpy(to_numpy(case.free.states))
    scores, index = token_scores(states, policy.scorer).numpy(), case.prompt.visual_index
    own = select_tokens(scores, case.k, select=policy.select, visual_index=index, budget=policy.budget)
    difference = kept_difference(
        scores,
        own,
        kept,
        case.k,
        visual_index=index,
        select=policy.select,
        budget=policy.budget,
        tolerance=tolerance,
    )
    if difference is KeptDifference.EQUAL:
        return Comparison(Verdict.PASS, 0.0, tolerance, 1.0, case.question.name)
    exchanged = np.isin(index, own) != np.isin(index, kept)
    edges = _edges(scores, np.isin(index, own), index, policy)
    apart = float(np.abs(scores - edges)[exchanged].max(initial=0.0)) if len(kept) == case.k else math.inf
    note = (
        f"{len(np.setdiff1d(own, kept))} of {case.k} kept tokens differ, by scores within {apart:.1e} of the "
        "last one kept"
    )
    return Comparison(_VERDICTS[difference], apart, tolerance, 1.0, case.question.name, note)


def _edges(
    scores: NDArray[np.float64], kept: NDArray[np.bool_], index: NDArray[np.int64], policy: Policy
) -> NDArray[np.float64]:
    """For every token the score of the last one kept: of all, or of its picture where each has its budget."""
    pictures = picture_of(index) if policy.budget is Budget.PER_PICTURE else np.zeros_like(index)
    edges = np.full(len(scores), math.inf)  # a picture of which nothing is kept has none
    for picture in np.unique(pictures[kept]):
        inside = pictures == picture
        own = scores[inside & kept]
        edges[inside] = own.min() if policy.select is Select.HIGHEST else own.max()
    return edges


def choice_tolerance(
    manifest: Manifest,
    states: NDArray[np.float32],
    *,
    layers: int,
    half_states: NDArray[np.float32] | None = None,
) -> float:
    """How far apart two exact scores may be and still change places in a graph: a near-tie.

    Args:
        manifest: The bundle's.
        states: [N, heads, head_dim] of the oracle.
        layers: Layers these states went through.
        half_states: The same by the oracle in the graphs' half type, if they have one.
    """
    return _spread(manifest, states) + 2 * _sensitivity(manifest, states, layers, half_states)


def _spread(manifest: Manifest, states: NDArray[np.float32]) -> float:
    """How far the exported scoring can move two of these tokens against each other."""
    policy, degree = manifest.policy, manifest.degree
    exact = token_scores(torch.from_numpy(states), policy.scorer)
    exported = torch.from_numpy(run_scores(states, policy.scorer, degree))
    return approximation_spread(exact, exported) + EXACT_TOLERANCE


def _sensitivity(
    manifest: Manifest, states: NDArray[np.float32], layers: int, half_states: NDArray[np.float32] | None
) -> float:
    """How far rounding on the way to layer K-1 moves a score: measured, by rounding differently."""
    scorer = manifest.policy.scorer
    exact = token_scores(torch.from_numpy(states), scorer)
    if half_states is not None:
        moved = [token_scores(torch.from_numpy(half_states), scorer)]
    else:
        relative = _TYPICAL * float32_tolerance(manifest.dims, layers).relative
        generator = np.random.default_rng(0)
        size = relative * float(np.abs(states).mean())
        moved = [
            token_scores(torch.from_numpy(states + size * generator.standard_normal(states.shape)), scorer)
            for _ in range(2)
        ]
    return max(float((other - exact).abs().max()) for other in moved)

"""Every visual token scored by itself, the best kept: selection, its near-ties, its ONNX function.

The function is the node EntropyPrune of domain `ep_export`, version 2: inputs states [1,S,H,D], hidden
[1,S,d], position_ids [A,1,S], visual_index [N] and keep_slots [k] (only its length is read); outputs
kept_hidden [1,M,d], kept_position_ids [A,1,M], kept_index [M], kept_visual_index [k] and scores [N] float32,
M = S - N + k. ONNX Runtime and TensorRT-RTX run its body of standard operators; TensorRT takes our plugin
when it is loaded, and finds it by `plugin_namespace`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.choosers.base import Choice, ChooserForm, CutTokens, KeptDifference, PruneInputs
from ep_export.choosers.gathering import gather_kept
from ep_export.entropy.scores import token_scores
from ep_export.policy import Budget, Select, TopK

if TYPE_CHECKING:
    import onnx_ir as ir

    from ep_export.graph import Nodes

__all__ = [
    "DOMAIN",
    "EXACT_TOLERANCE",
    "OP_TYPE",
    "TopKForm",
    "kept_difference",
    "picture_of",
    "prune_function",
    "select_tokens",
]

DOMAIN = "ep_export"
OP_TYPE = "EntropyPrune"

EXACT_TOLERANCE = 2e-6
"""Near-tie between two exact scorers: three times the 7e-7 that a float32 Gram costs against float64."""

_INPUTS = ("states", "hidden", "position_ids", "visual_index", "keep_slots")
_OUTPUTS = ("kept_hidden", "kept_position_ids", "kept_index", "kept_visual_index", "scores")
_ATTRIBUTES = ("scorer", "select", "budget", "plugin_namespace", "plugin_version")

_WORST = -3.4e38
"""Beyond every finite score of interest, itself finite: what a NaN or infinite score becomes."""

_Array = TypeVar("_Array", torch.Tensor, NDArray[Any])


class TopKForm(ChooserForm[TopK]):
    """Scores of `ep_export.entropy`, selection of `select_tokens`."""

    def choose(self, chooser: TopK, tokens: CutTokens, k: int) -> Choice:
        """Scores in float64, then `select_tokens`.

        Raises:
            ValueError: There are no states, or k is not 0 to N.
        """
        scores = _exact_scores(chooser, tokens)
        return Choice(_select(chooser, tokens, scores, k), scores)

    def difference(
        self, chooser: TopK, tokens: CutTokens, kept: torch.Tensor, k: int, *, tolerance: float
    ) -> KeptDifference:
        """See `kept_difference`."""
        scores = _exact_scores(chooser, tokens)
        return kept_difference(
            scores,
            _select(chooser, tokens, scores, k),
            kept,
            k,
            visual_index=tokens.visual_index,
            select=chooser.select,
            budget=chooser.budget,
            tolerance=tolerance,
        )

    def body(self, nodes: Nodes, chooser: TopK, inputs: PruneInputs) -> tuple[ir.Value, ir.Value]:
        """Scores without eigenvalues, then TopK."""
        from ep_export.entropy.scores_body import append_scores

        states = nodes.op("Gather", inputs.scored(), inputs.visual_index, axis=1)
        states = nodes.op("Squeeze", states, nodes.ints(0))
        scores = append_scores(nodes, states, chooser.scorer, inputs.heads, inputs.degree)
        goodness = _goodness(nodes, scores, chooser.select)
        if chooser.budget is Budget.PER_PICTURE:
            goodness = _picture_goodness(nodes, goodness, inputs.visual_index)
        best = nodes.ops("TopK", (goodness, inputs.count(nodes)), 2, axis=0, largest=1, sorted=1)[1]
        return nodes.op("Gather", inputs.visual_index, best, axis=0), scores


def prune_function(
    chooser: TopK, *, heads: int, degree: int, opset: int = 20
) -> tuple[ir.Function, dict[str, str]]:
    """EntropyPrune for a chooser, and the attributes of the node that calls it.

    Args:
        chooser: Scorer, select and budget are read; the source says which states the caller connects.
        heads: Heads of the scored states.
        degree: Degree of the entropy series.
        opset: Opset of the body; TensorRT wants the model's own.
    """
    import onnx_ir as ir

    from ep_export.graph import Nodes

    nodes = Nodes()
    states, hidden, position_ids, visual_index, keep_slots = values = [ir.Value(name=n) for n in _INPUTS]
    inputs = PruneInputs(states, hidden, visual_index, keep_slots, heads, degree)
    kept, scores = TopKForm().body(nodes, chooser, inputs)
    outputs = [*gather_kept(nodes, hidden, position_ids, visual_index, kept), nodes.op("Identity", scores)]
    for value, name in zip(outputs, _OUTPUTS, strict=True):
        value.name = name
    graph = ir.Graph(values, outputs, nodes=nodes.nodes, opset_imports={"": opset}, name=OP_TYPE)
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in _ATTRIBUTES]
    attributes = {
        "scorer": chooser.scorer.value,
        "select": chooser.select.value,
        "budget": chooser.budget.value,
        "plugin_namespace": DOMAIN,
        "plugin_version": "2",
    }
    return ir.Function(DOMAIN, OP_TYPE, graph=graph, attributes=declared), attributes


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


def _exact_scores(chooser: TopK, tokens: CutTokens) -> torch.Tensor:
    if tokens.states is None:
        raise ValueError(f"{chooser.name} scores states, and there are none")
    return token_scores(tokens.states, chooser.scorer)


def _select(chooser: TopK, tokens: CutTokens, scores: torch.Tensor, k: int) -> torch.Tensor:
    return select_tokens(
        scores, k, select=chooser.select, visual_index=tokens.visual_index, budget=chooser.budget
    )


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


def _goodness(nodes: Nodes, scores: ir.Value, select: Select) -> ir.Value:
    """Larger is kept first. What is not finite ranks last whichever end is selected."""
    directed = scores if select is Select.HIGHEST else nodes.op("Neg", scores)
    finite = nodes.op("Less", nodes.op("Abs", scores), nodes.number(-_WORST))  # false for NaN and infinity
    return nodes.op("Where", finite, directed, nodes.number(_WORST))


def _picture_goodness(nodes: Nodes, goodness: ir.Value, visual_index: ir.Value) -> ir.Value:
    """-(rank in its picture + 1/2) / (tokens of its picture): every picture keeps its share.

    Pictures are maximal runs of consecutive positions; a text token always lies between two.
    """
    # Runs: the position minus the rank among visual tokens is the same within a run and grows between runs.
    order = nodes.indices(nodes.length(visual_index))
    run = nodes.op("Sub", visual_index, order)
    columns, rows = nodes.ints(1), nodes.ints(0)
    run_row, run_column = nodes.op("Unsqueeze", run, rows), nodes.op("Unsqueeze", run, columns)
    good_row, good_column = nodes.op("Unsqueeze", goodness, rows), nodes.op("Unsqueeze", goodness, columns)
    order_row, order_column = nodes.op("Unsqueeze", order, rows), nodes.op("Unsqueeze", order, columns)
    same = nodes.op("Equal", run_column, run_row)  # [N, N], row i against column j
    better = nodes.op("Greater", good_row, good_column)
    earlier = nodes.op(
        "And", nodes.op("Equal", good_row, good_column), nodes.op("Less", order_row, order_column)
    )
    before = nodes.op("And", same, nodes.op("Or", better, earlier))
    rank = _count(nodes, before)
    share = nodes.op("Div", nodes.op("Add", rank, nodes.number(0.5)), _count(nodes, same))
    return nodes.op("Neg", share)


def _count(nodes: Nodes, truth: ir.Value) -> ir.Value:
    """[N, N] bool -> [N] float32, exact below 2^24."""
    return nodes.op("ReduceSum", nodes.to_float(truth), nodes.ints(1), keepdims=0)

"""The EntropyPrune node: a function of standard operators that a plugin may replace.

Domain `ep_export`, inputs states [1,S,H,D], hidden [1,S,d], position_ids [A,1,S], visual_index [N] and
keep_slots [k] (only its length is read); outputs kept_hidden [1,M,d], kept_position_ids [A,1,M] and
kept_index [M], M = S - N + k. Text tokens always stay; order and positions are kept.

ONNX Runtime and TensorRT-RTX run the body; TensorRT takes our plugin when it is loaded, and finds it by
`plugin_namespace`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ep_export.export.scores_body import Body, append_scores
from ep_export.policy import Budget, Policy, Scorer, Select

__all__ = ["DOMAIN", "OP_TYPE", "prune_function", "scores_model", "strip_body"]

DOMAIN = "ep_export"
OP_TYPE = "EntropyPrune"
_ATTRIBUTES = ("scorer", "select", "budget", "plugin_namespace", "plugin_version")
# A score beyond every finite one of interest, itself finite: what a NaN or infinite score becomes.
_WORST = -3.4e38
_FLOAT = int(ir.DataType.FLOAT)


def prune_function(
    policy: Policy, *, heads: int, degree: int, opset: int = 20
) -> tuple[ir.Function, dict[str, str]]:
    """The function for a policy, and the attributes of the node that calls it.

    Args:
        policy: Scorer, select and budget are read; layer and source say where the node stands.
        heads: Heads of the scored states.
        degree: Degree of the entropy series.
        opset: Opset of the body; TensorRT wants the model's own.
    """
    names = ("states", "hidden", "position_ids", "visual_index", "keep_slots")
    states, hidden, positions, visual_index, keep_slots = inputs = [ir.Value(name=name) for name in names]
    body = Body()
    visual = body.op("Squeeze", body.op("Gather", states, visual_index, axis=1), body.ints(0))
    scores = append_scores(body, visual, policy.scorer, heads, degree)
    goodness = _goodness(body, scores, policy.select)
    if policy.budget is Budget.PER_PICTURE:
        goodness = _picture_goodness(body, goodness, visual_index)
    best = body.ops("TopK", (goodness, body.op("Shape", keep_slots)), 2, axis=0, largest=1, sorted=1)[1]
    kept = body.op("Gather", visual_index, best, axis=0)
    index = _compact(body, hidden, visual_index, kept, keep_slots)
    outputs = [
        body.op("Gather", hidden, index, axis=1),
        body.op("Gather", positions, index, axis=2),
        body.op("Identity", index),
    ]
    for value, name in zip(outputs, ("kept_hidden", "kept_position_ids", "kept_index"), strict=True):
        value.name = name
    graph = ir.Graph(inputs, outputs, nodes=body.nodes, opset_imports={"": opset}, name=OP_TYPE)
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in _ATTRIBUTES]
    attributes = {
        "scorer": policy.scorer.value,
        "select": policy.select.value,
        "budget": policy.budget.value,
        "plugin_namespace": DOMAIN,
        "plugin_version": "1",
    }
    return ir.Function(DOMAIN, OP_TYPE, graph=graph, attributes=declared), attributes


def scores_model(heads: int, head_dim: int, scorer: Scorer, degree: int, *, opset: int = 20) -> ir.Model:
    """The scores alone, for validation and benchmarks: states [N, heads, head_dim] -> scores [N] float32."""
    shape = ir.Shape(("N", heads, head_dim))
    states = ir.Value(name="states", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    body = Body()
    scores = body.op("Identity", append_scores(body, states, scorer, heads, degree))
    scores.name = "scores"
    scores.type, scores.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("N",))
    graph = ir.Graph([states], [scores], nodes=body.nodes, opset_imports={"": opset}, name="token_scores")
    return ir.Model(graph, ir_version=10, producer_name=DOMAIN)


def strip_body(source: Path, destination: Path) -> None:
    """Copy a model without the body of EntropyPrune, for TensorRT 10.3, where a body wins over the plugin.

    External data is still referenced by the same relative locations: write beside the source.
    """
    model = ir.load(source)
    model.functions.pop((DOMAIN, OP_TYPE, ""), None)
    ir.save(model, destination)


def _goodness(body: Body, scores: ir.Value, select: Select) -> ir.Value:
    """Larger is kept first. What is not finite ranks last whichever end is selected."""
    directed = scores if select is Select.HIGHEST else body.op("Neg", scores)
    finite = body.op("Less", body.op("Abs", scores), body.number(-_WORST))  # false for NaN and infinity
    return body.op("Where", finite, directed, body.number(_WORST))


def _picture_goodness(body: Body, goodness: ir.Value, visual_index: ir.Value) -> ir.Value:
    """-(rank in its picture + 1/2) / (tokens of its picture): every picture keeps its share.

    Pictures are maximal runs of consecutive positions; a text token always lies between two.
    """
    # Runs: the position minus the rank among visual tokens is the same within a run and grows between runs.
    order = body.op("Range", body.number(0, np.int64), _length(body, visual_index), body.number(1, np.int64))
    run = body.op("Sub", visual_index, order)
    columns, rows = body.ints(1), body.ints(0)
    run_row, run_column = body.op("Unsqueeze", run, rows), body.op("Unsqueeze", run, columns)
    good_row, good_column = body.op("Unsqueeze", goodness, rows), body.op("Unsqueeze", goodness, columns)
    order_row, order_column = body.op("Unsqueeze", order, rows), body.op("Unsqueeze", order, columns)
    same = body.op("Equal", run_column, run_row)  # [N, N], row i against column j
    better = body.op("Greater", good_row, good_column)
    earlier = body.op(
        "And", body.op("Equal", good_row, good_column), body.op("Less", order_row, order_column)
    )
    before = body.op("And", same, body.op("Or", better, earlier))
    rank = _count(body, before)
    share = body.op("Div", body.op("Add", rank, body.number(0.5)), _count(body, same))
    return body.op("Neg", share)


def _count(body: Body, truth: ir.Value) -> ir.Value:
    """[N, N] bool -> [N] float32, exact below 2^24."""
    return body.op("ReduceSum", body.op("Cast", truth, to=_FLOAT), body.ints(1), keepdims=0)


def _compact(
    body: Body, hidden: ir.Value, visual_index: ir.Value, kept: ir.Value, keep_slots: ir.Value
) -> ir.Value:
    """Positions that stay, ascending, [M] int64.

    A prefix sum gives every position its place: kept ones first, dropped ones after them, so that the places
    are a permutation and the first M entries are the answer. No TopK over the prompt, whose k TensorRT limits
    to 3840.
    """
    length = body.op("Shape", hidden, start=1, end=2)  # [1]
    everyone = body.op("ConstantOfShape", length, value=ir.tensor(np.array([1], dtype=np.int64)))
    dropped_mark = body.op("Mul", visual_index, body.number(0, np.int64))  # zeros [N] without another Shape
    kept_mark = body.op("Add", body.op("Mul", kept, body.number(0, np.int64)), body.number(1, np.int64))
    text_only = body.op("ScatterElements", everyone, visual_index, dropped_mark, axis=0)
    stays = body.op("ScatterElements", text_only, kept, kept_mark, axis=0)  # [S], 1 where kept
    one, zero = body.number(1, np.int64), body.number(0, np.int64)
    goes = body.op("Sub", one, stays)
    m = body.op("Add", body.op("Sub", length, body.op("Shape", visual_index)), body.op("Shape", keep_slots))
    place_kept = body.op("Sub", body.op("CumSum", stays, zero), one)
    place_gone = body.op("Add", body.op("Sub", body.op("CumSum", goes, zero), one), m)
    place = body.op("Where", body.op("Equal", stays, one), place_kept, place_gone)
    position = body.op("Range", zero, body.op("Squeeze", length), one)
    ordered = body.op("ScatterElements", position, place, position, axis=0)
    return body.op("Slice", ordered, body.ints(0), m, body.ints(0))


def _length(body: Body, vector: ir.Value) -> ir.Value:
    return body.op("Squeeze", body.op("Shape", vector))

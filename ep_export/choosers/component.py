"""A chooser as an ONNX model of its own: the prune component that stands between two spans of the decoder."""

from __future__ import annotations

import onnx_ir as ir

from ep_export.choosers import PruneInputs, form_of, state_heads
from ep_export.choosers.gathering import gather_kept
from ep_export.choosers.top_k import DOMAIN, OP_TYPE, prune_function
from ep_export.dims import DecoderDims
from ep_export.graph import Nodes
from ep_export.policy import Chooser, Nothing, Source, TopK, reads_projections, scored_source

__all__ = ["build_prune"]

_INT64 = ir.DataType.INT64
_FLOAT = ir.DataType.FLOAT
_IR_VERSION = 10


def build_prune(
    chooser: Chooser,
    *,
    dims: DecoderDims,
    cut_layer: int,
    precision_dtype: ir.DataType,
    degree: int,
    opset: int,
) -> ir.Model:
    """The prune component of one cut.

    Inputs, of which a graph has those its chooser reads: states [1, S, heads, head_dim], hidden [1, S, d],
    position_ids [A, 1, S], visual_index [N], keep_slots [k] (only its length is read). Outputs: kept_hidden
    [1, M, d], kept_position_ids [A, 1, M], kept_index [M], kept_visual_index [k], scores [N] float32 (none
    for `Nothing`). M = S - N + k.

    Args:
        chooser: Which tokens stay.
        dims: The decoder's dimensions.
        cut_layer: K; at 0 the component follows the embeddings.
        precision_dtype: Type of states and hidden; attention is float32 in every graph.
        degree: Of the entropy series, one of `policy.DEGREES`.
        opset: Of the default domain.

    Raises:
        ValueError: Projections are to be scored before there is a layer.
    """
    values = _inputs(chooser, dims, precision_dtype)
    if "states" in values and cut_layer == 0:
        raise ValueError(f"{chooser.name} scores projections, and there are none at layer 0")
    nodes = Nodes()
    functions: list[ir.Function] = []
    if isinstance(chooser, TopK):
        results, function = _entropy_prune(nodes, chooser, values, dims, degree=degree, opset=opset)
        functions.append(function)
    else:
        results = _plain(nodes, chooser, values, dims, degree)
    outputs = _outputs(results, dims, precision_dtype, nothing=isinstance(chooser, Nothing))
    imports = {"": opset, DOMAIN: 1} if functions else {"": opset}
    graph = ir.Graph(
        list(values.values()), outputs, nodes=nodes.nodes, opset_imports=imports, name=f"prune_{chooser.name}"
    )
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name=DOMAIN, functions=functions)


def _inputs(chooser: Chooser, dims: DecoderDims, dtype: ir.DataType) -> dict[str, ir.Value]:
    values: dict[str, ir.Value] = {}

    def add(name: str, kind: ir.DataType, *shape: int | str) -> None:
        values[name] = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))

    if scored_source(chooser) is Source.ATTENTION:
        add("states", _FLOAT, 1, "S", 1, 1)
    elif reads_projections(chooser):
        add("states", dtype, 1, "S", _heads(chooser, dims), dims.head_dim)
    add("hidden", dtype, 1, "S", dims.hidden_size)
    add("position_ids", _INT64, dims.position_axes, 1, "S")
    add("visual_index", _INT64, "N")
    if not isinstance(chooser, Nothing):
        add("keep_slots", _INT64, "k")
    return values


def _entropy_prune(
    nodes: Nodes, chooser: TopK, values: dict[str, ir.Value], dims: DecoderDims, *, degree: int, opset: int
) -> tuple[list[ir.Value], ir.Function]:
    """One node, so that a plugin can take its place."""
    states, heads = _states(nodes, chooser, values, dims), _heads(chooser, dims)
    function, attributes = prune_function(chooser, heads=heads, degree=degree, opset=opset)
    inputs = [states, *(values[name] for name in ("hidden", "position_ids", "visual_index", "keep_slots"))]
    node = ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, num_outputs=5, name=OP_TYPE)
    nodes.nodes.append(node)
    return list(node.outputs), function


def _plain(
    nodes: Nodes, chooser: Chooser, values: dict[str, ir.Value], dims: DecoderDims, degree: int
) -> list[ir.Value]:
    """Standard operators alone."""
    hidden, visual_index = values["hidden"], values["visual_index"]
    states = None if scored_source(chooser) is None else _states(nodes, chooser, values, dims)
    heads = _heads(chooser, dims)
    inputs = PruneInputs(states, hidden, visual_index, values.get("keep_slots"), heads=heads, degree=degree)
    kept, scores = form_of(chooser).body(nodes, chooser, inputs)
    results = list(gather_kept(nodes, hidden, values["position_ids"], visual_index, kept))
    return results if scores is None else [*results, nodes.op("Identity", scores)]


def _states(nodes: Nodes, chooser: Chooser, values: dict[str, ir.Value], dims: DecoderDims) -> ir.Value:
    """What is scored, [1, S, heads, head_dim]: projections, or the hidden states seen as heads."""
    if "states" in values:
        return values["states"]
    heads = _heads(chooser, dims)
    return nodes.op("Reshape", values["hidden"], nodes.ints(1, -1, heads, dims.hidden_size // heads))


def _heads(chooser: Chooser, dims: DecoderDims) -> int:
    """Heads of the states that a chooser scores."""
    source = scored_source(chooser)
    return dims.heads if source is None else state_heads(source, dims)


def _outputs(
    results: list[ir.Value], dims: DecoderDims, dtype: ir.DataType, *, nothing: bool
) -> list[ir.Value]:
    kinds: dict[str, tuple[ir.DataType, tuple[int | str, ...]]] = {
        "kept_hidden": (dtype, (1, "M", dims.hidden_size)),
        "kept_position_ids": (_INT64, (dims.position_axes, 1, "M")),
        "kept_index": (_INT64, ("M",)),
        "kept_visual_index": (_INT64, (0 if nothing else "k",)),
        "scores": (_FLOAT, ("N",)),
    }
    for value, (name, (kind, shape)) in zip(results, kinds.items(), strict=False):
        value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(shape)
    return results

"""Prune components: their interface, for every chooser, precision and opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from prune_graphs import DIMS, kept_positions, prompt, run, session

from ep_export.choosers import choose
from ep_export.choosers.component import build_prune
from ep_export.policy import (
    Chooser,
    Coverage,
    MaxMin,
    Nothing,
    Random,
    Source,
    TopK,
    chooser_named,
    reads_projections,
    scored_source,
)

NAMES = (
    "paper-highest",
    "released-lowest-key",
    "norm-highest-value-per-picture",
    "order2-highest-hidden",
    "divprune",
    "norm-highest-attention",
    "coverage-paper-highest",
    "coverage-norm-lowest-value",
    "coverage-order2-highest-hidden",
    "random",
    "random-7",
    "nothing",
)
TYPES = {
    ir.DataType.FLOAT: onnx.TensorProto.FLOAT,
    ir.DataType.FLOAT16: onnx.TensorProto.FLOAT16,
    ir.DataType.BFLOAT16: onnx.TensorProto.BFLOAT16,
}


def model(
    chooser: Chooser, *, dtype: ir.DataType = ir.DataType.FLOAT, opset: int = 20, cut_layer: int = 2
) -> onnx.ModelProto:
    built = build_prune(
        chooser, dims=DIMS, cut_layer=cut_layer, precision_dtype=dtype, degree=16, opset=opset
    )
    return ir.to_proto(built)


def interface(values: object) -> dict[str, tuple[int, list[object]]]:
    """Name -> (element type, shape) of a graph's inputs or outputs."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", list(TYPES), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", NAMES)
def test_interface(name: str, dtype: ir.DataType, opset: int) -> None:
    chooser = chooser_named(name)
    proto = model(chooser, dtype=dtype, opset=opset)
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    float_type, int64 = TYPES[dtype], onnx.TensorProto.INT64
    expected: dict[str, tuple[int, list[object]]] = {}
    if reads_projections(chooser):
        heads = 6 if scored_source(chooser) is Source.QUERY else 3
        expected["states"] = (float_type, [1, "S", heads, 16])
        if scored_source(chooser) is Source.ATTENTION:
            expected["states"] = (onnx.TensorProto.FLOAT, [1, "S", 1, 1])
    expected["hidden"] = (float_type, [1, "S", 48])
    expected["position_ids"] = (int64, [3, 1, "S"])
    expected["visual_index"] = (int64, ["N"])
    if not isinstance(chooser, Nothing):
        expected["keep_slots"] = (int64, ["k"])
    inputs = interface(proto.graph.input)
    assert inputs == expected
    assert list(inputs) == list(expected)
    outputs = {
        "kept_hidden": (float_type, [1, "M", 48]),
        "kept_position_ids": (int64, [3, 1, "M"]),
        "kept_index": (int64, ["M"]),
        "kept_visual_index": (int64, ["k"] if "keep_slots" in expected else [0]),
        "scores": (onnx.TensorProto.FLOAT, ["N"]),
    }
    if isinstance(chooser, Nothing):
        del outputs["scores"]
    assert interface(proto.graph.output) == outputs
    assert [value.name for value in proto.graph.output] == list(outputs)


@pytest.mark.parametrize("name", NAMES)
def test_only_entropy_prune_is_a_node_of_our_own(name: str) -> None:
    chooser = chooser_named(name)
    own = [node.op_type for node in model(chooser).graph.node if node.domain]
    assert own == (["EntropyPrune"] if isinstance(chooser, TopK) else [])


@pytest.mark.parametrize("name", NAMES)
def test_names_are_unique_so_that_no_subgraph_hides_a_value(name: str) -> None:
    def names(graph: onnx.GraphProto) -> list[str]:
        found = [value.name for value in graph.input]
        for node in graph.node:
            found += node.output
            found += [
                inner
                for attribute in node.attribute
                if attribute.HasField("g")
                for inner in names(attribute.g)
            ]
        return found

    found = names(model(chooser_named(name)).graph)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_components_run_on_a_cpu(name: str) -> None:
    """Gather and Cast have kernels, and the rest is float32 and int64: no engine is needed for them."""
    import ml_dtypes

    chooser = chooser_named(name)
    at = prompt(chooser, np.arange(4, 34), 40)
    proto = model(chooser, dtype=ir.DataType.BFLOAT16)
    opened = onnxruntime.InferenceSession(proto.SerializeToString())
    arrays = {
        "hidden": at.hidden[None],
        "states": None if at.states is None else at.states[None],
        "position_ids": at.positions,
        "visual_index": at.visual_index,
        "keep_slots": np.zeros(8, dtype=np.int64),
    }
    feeds = {}
    for entry in opened.get_inputs():
        array = arrays[entry.name]
        if entry.type == "tensor(bfloat16)":
            bits = array.astype(ml_dtypes.bfloat16).view(np.uint16)
            kind = onnx.TensorProto.BFLOAT16
            feeds[entry.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
        else:
            feeds[entry.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    results = opened.run_with_ort_values(["kept_hidden", "kept_index"], feeds)
    assert results[0].data_type() == "tensor(bfloat16)"
    rounded = [
        None if a is None else a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (at.hidden, at.states)
    ]
    same = run(session(chooser, degree=16), type(at)(*rounded, at.positions, at.visual_index), 8)
    np.testing.assert_array_equal(results[1].numpy(), same["kept_index"])


@pytest.mark.parametrize("chooser", [MaxMin(), Random(), Nothing(), TopK(source=Source.HIDDEN)], ids=str)
def test_a_cut_before_the_first_layer_reads_hidden_alone(chooser: Chooser) -> None:
    inputs = [value.name for value in model(chooser, cut_layer=0).graph.input]
    assert "states" not in inputs
    assert "hidden" in inputs


def test_projections_before_the_first_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="paper-highest scores projections, and there are none at layer 0"):
        model(TopK(), cut_layer=0)


def test_one_graph_serves_every_k() -> None:
    at = prompt(MaxMin(), np.arange(4, 34), 40)
    for chooser in (MaxMin(), Coverage(), Random(2), TopK()):
        opened, at = session(chooser), prompt(chooser, np.arange(4, 34), 40)
        for k in (1, 12, 30):
            outputs = run(opened, at, k)
            np.testing.assert_array_equal(kept_positions(outputs), choose(chooser, at.tokens, k).kept)
            assert len(outputs["kept_index"]) == 10 + k

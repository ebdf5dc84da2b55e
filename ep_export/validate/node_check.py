"""The EntropyPrune node alone: its scores and its choice on states the oracle computed.

Feeding it the oracle's own states separates what the node gets wrong from what reached it wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.policy import Scorer

__all__ = ["NodeRunner", "run_scores"]


class NodeRunner:
    """The node as it stands in a bundle's head, its body run by ONNX Runtime on given states."""

    def __init__(self, head_file: Path) -> None:
        """Cut the node and its function out of `decoder_head.onnx`.

        Raises:
            UserError: The file has no such node, or no body for it.
        """
        import onnx_ir as ir

        from ep_export.export.prune_node import DOMAIN, OP_TYPE

        head = ir.load(head_file)
        nodes = [node for node in head.graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
        function = head.functions.get((DOMAIN, OP_TYPE, ""))
        if len(nodes) != 1 or function is None:
            raise UserError(
                f"{head_file.name} holds {len(nodes)} {OP_TYPE} nodes and {'a' if function else 'no'} body, "
                "expected one node with its body",
                hint="build the bundle again",
            )
        self._session = _session(_around(nodes[0], function, dict(head.graph.opset_imports)))

    def kept_index(
        self, states: NDArray[np.float32], visual_index: NDArray[np.int64], length: int, k: int
    ) -> NDArray[np.int64]:
        """What the node keeps.

        Args:
            states: [N, heads, head_dim] of the visual tokens; text tokens get zeros, which are not read.
            visual_index: [N].
            length: S.
            k: Visual tokens to keep.

        Returns:
            [M] kept prompt positions.
        """
        every = np.zeros((1, length, *states.shape[1:]), dtype=np.float32)
        every[0, visual_index] = states
        feeds = {
            "states": every,
            "hidden": np.zeros((1, length, 1), dtype=np.float32),
            "position_ids": np.zeros((1, 1, length), dtype=np.int64),
            "visual_index": visual_index,
            "keep_slots": np.zeros(k, dtype=np.int64),
        }
        kept: NDArray[np.int64] = self._session.run(["kept_index"], feeds)[0]
        return kept


def run_scores(states: NDArray[np.float32], scorer: Scorer, degree: int) -> NDArray[np.float32]:
    """Scores of the exported body in ONNX Runtime.

    Args:
        states: [N, heads, head_dim].
        scorer: The score.
        degree: Degree of the entropy series.

    Returns:
        [N] float32.
    """
    from ep_export.export.prune_node import scores_model

    model = scores_model(states.shape[1], states.shape[2], scorer, degree)
    scores: NDArray[np.float32] = _session(model).run(["scores"], {"states": states})[0]
    return scores


def _around(node: Any, function: Any, opsets: dict[str, int]) -> Any:
    """A model of the node alone, float32 throughout, every axis dynamic."""
    import onnx_ir as ir

    symbols = {
        "states": (ir.DataType.FLOAT, (1, "S", "H", "D")),
        "hidden": (ir.DataType.FLOAT, (1, "S", "d")),
        "position_ids": (ir.DataType.INT64, ("A", 1, "S")),
        "visual_index": (ir.DataType.INT64, ("N",)),
        "keep_slots": (ir.DataType.INT64, ("k",)),
    }
    inputs = [
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        for name, (kind, shape) in symbols.items()
    ]
    alone = ir.Node(
        node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs)
    )
    kept = alone.outputs[2]
    kept.name, kept.type, kept.shape = "kept_index", ir.TensorType(ir.DataType.INT64), ir.Shape(("M",))
    for output, name in zip(alone.outputs[:2], ("kept_hidden", "kept_position_ids"), strict=True):
        output.name = name
    graph = ir.Graph(inputs, [kept], nodes=[alone], opset_imports=opsets, name="entropy_prune")
    return ir.Model(graph, ir_version=10, functions=[function])


def _session(model: Any) -> Any:
    import onnx_ir as ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

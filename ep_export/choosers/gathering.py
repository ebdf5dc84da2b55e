"""What every prune graph does with a choice: the rows that stay, and where the visual ones are then.

Text always stays; order and positions are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from ep_export.graph import Nodes

__all__ = ["gather_kept"]


def gather_kept(
    nodes: Nodes, hidden: ir.Value, position_ids: ir.Value, visual_index: ir.Value, kept: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Append the gathering of what stays.

    Args:
        nodes: Where to.
        hidden: [1, S, d].
        position_ids: [A, 1, S].
        visual_index: [N] int64 positions of the visual tokens.
        kept: [k] int64 positions, in any order, each one of `visual_index`; k may be 0.

    Returns:
        kept_hidden [1, M, d], kept_position_ids [A, 1, M], kept_index [M] int64, and kept_visual_index [k]
        int64: which of the M rows are visual. M = S - N + k; indices ascend.
    """
    length, count = nodes.length(hidden, 1), nodes.length(kept)
    nothing = nodes.op("Expand", nodes.whole(0), length)
    everything = nodes.op("Expand", nodes.whole(1), length)
    # 0 * index stands for as many zeros without asking for another shape
    gone = nodes.op("Mul", visual_index, nodes.whole(0))
    stay = nodes.op("Add", nodes.op("Mul", kept, nodes.whole(0)), nodes.whole(1))
    text = nodes.op("ScatterElements", everything, visual_index, gone, axis=0)
    rows = nodes.op("Add", nodes.op("Sub", length, nodes.length(visual_index)), count)
    index = _marked(nodes, nodes.op("ScatterElements", text, kept, stay, axis=0), rows)
    visual = nodes.op("ScatterElements", nothing, kept, stay, axis=0)
    return (
        nodes.op("Gather", hidden, index, axis=1),
        nodes.op("Gather", position_ids, index, axis=2),
        nodes.op("Identity", index),
        _marked(nodes, nodes.op("Gather", visual, index, axis=0), count),
    )


def _marked(nodes: Nodes, marks: ir.Value, count: ir.Value) -> ir.Value:
    """Places of the ones among zeros and ones, ascending: [count] int64.

    A prefix sum gives every place its number: marked ones first, the others after them, so that the numbers
    are a permutation and the first `count` entries are the answer. No NonZero, whose length no runtime knows
    ahead; no TopK over the prompt, whose k TensorRT limits to 3840.
    """
    one, zero = nodes.whole(1), nodes.whole(0)
    others = nodes.op("Sub", one, marks)
    number = nodes.op("Sub", nodes.op("CumSum", marks, zero), one)
    number_after = nodes.op("Add", nodes.op("Sub", nodes.op("CumSum", others, zero), one), count)
    number = nodes.op("Where", nodes.op("Equal", marks, one), number, number_after)
    places = nodes.indices(nodes.length(marks))
    ordered = nodes.op("ScatterElements", places, number, places, axis=0)
    return nodes.op("Slice", ordered, nodes.ints(0), count, nodes.ints(0))

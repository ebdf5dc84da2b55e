"""What stays is gathered in order, and the visual rows are found again: one cut after another."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from prune_graphs import Prompt, kept_positions, prompt, run, session

from ep_export.choosers import choose
from ep_export.choosers.gathering import gather_kept
from ep_export.graph import Nodes
from ep_export.policy import (
    Budget,
    Chooser,
    Coverage,
    MaxMin,
    Nothing,
    Random,
    Scorer,
    Select,
    Source,
    TopK,
    scored_source,
)


def gather(
    hidden: np.ndarray, positions: np.ndarray, visual: np.ndarray, kept: np.ndarray
) -> list[np.ndarray]:
    kinds = {
        "hidden": (ir.DataType.FLOAT, (1, "S", hidden.shape[2])),
        "position_ids": (ir.DataType.INT64, (positions.shape[0], 1, "S")),
        "visual_index": (ir.DataType.INT64, ("N",)),
        "kept": (ir.DataType.INT64, ("k",)),
    }
    inputs = [ir.Value(name=n, type=ir.TensorType(t), shape=ir.Shape(s)) for n, (t, s) in kinds.items()]
    nodes = Nodes()
    outputs = gather_kept(nodes, *inputs)
    types = (ir.DataType.FLOAT, *[ir.DataType.INT64] * 3)
    for value, kind in zip(outputs, types, strict=True):
        value.type = ir.TensorType(kind)
    graph = ir.Graph(inputs, outputs, nodes=nodes.nodes, opset_imports={"": 20}, name="gather")
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    feeds = {"hidden": hidden, "position_ids": positions, "visual_index": visual, "kept": kept}
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)


@pytest.mark.parametrize("seed", range(8))
def test_rows_follow_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, 60))
    visual = np.sort(rng.permutation(length)[: rng.integers(1, length + 1)])
    kept = rng.permutation(visual)[: rng.integers(0, len(visual) + 1)]
    hidden = rng.standard_normal((1, length, 5)).astype(np.float32)
    positions = rng.integers(0, 99, (3, 1, length))
    stays = [i for i in range(length) if i not in visual or i in kept]
    kept_hidden, kept_positions_, index, kept_visual = gather(hidden, positions, visual, kept)
    assert index.tolist() == stays
    assert kept_visual.tolist() == [row for row, i in enumerate(stays) if i in kept]
    np.testing.assert_array_equal(kept_hidden, hidden[:, stays])
    np.testing.assert_array_equal(kept_positions_, positions[:, :, stays])


def test_more_rows_than_topk_allows_in_tensorrt() -> None:
    visual = np.arange(4990, 5000)
    index = gather(np.zeros((1, 5000, 1), np.float32), np.zeros((1, 1, 5000), np.int64), visual, visual)[2]
    np.testing.assert_array_equal(index, np.arange(5000))


SECOND = [
    MaxMin(),
    Coverage(Scorer.NORM, Select.LOWEST, Source.HIDDEN),
    Random(5),
    Nothing(),
    TopK(Scorer.NORM, Select.HIGHEST, Source.HIDDEN),
    TopK(Scorer.NORM, Select.LOWEST, Source.HIDDEN, Budget.PER_PICTURE),
]


@pytest.mark.parametrize("second", SECOND, ids=lambda chooser: chooser.name)
@pytest.mark.parametrize("first", [MaxMin(), Random(1), TopK()], ids=lambda chooser: chooser.name)
def test_a_second_component_chooses_on_what_the_first_one_kept(first: Chooser, second: Chooser) -> None:
    at = prompt(first, np.r_[3:40, 42:60], 66)  # two pictures
    one = run(session(first), at, 30)
    arrived = one["kept_index"]
    hidden = at.hidden[arrived]
    here = Prompt(
        hidden,
        hidden.reshape(len(hidden), 6, -1) if scored_source(second) is not None else None,
        at.positions[:, :, arrived],
        one["kept_visual_index"],
    )
    k = 0 if isinstance(second, Nothing) else 11
    two = run(session(second), here, k)
    # positions of the prompt, composed as a host does
    prompt_index = arrived[two["kept_index"]]
    np.testing.assert_array_equal(two["kept_hidden"][0], at.hidden[prompt_index])
    np.testing.assert_array_equal(two["kept_position_ids"], at.positions[:, :, prompt_index])
    text = np.setdiff1d(np.arange(66), at.visual_index)
    visual = np.setdiff1d(prompt_index, text)
    assert np.isin(text, prompt_index).all()
    # the same choice, made on the prompt's own rows that the first one kept
    kept = choose(first, at.tokens, 30).kept.numpy()
    np.testing.assert_array_equal(kept_positions(one), kept)
    states = at.hidden[kept].reshape(30, 6, -1) if scored_source(second) is not None else None
    again = type(at.tokens)(
        torch.from_numpy(at.hidden[kept]),
        None if states is None else torch.from_numpy(states),
        torch.from_numpy(one["kept_visual_index"]),
    )
    places = np.searchsorted(one["kept_visual_index"], choose(second, again, k).kept.numpy())
    np.testing.assert_array_equal(visual, kept[places])

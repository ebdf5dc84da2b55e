"""The EntropyPrune function against exact scores in NumPy float64 and the selection rule in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from ep_export.entropy import select_tokens, series_scores, token_scores
from ep_export.export import prune_function, scores_model, strip_body
from ep_export.policy import DEFAULT_DEGREE, Budget, Policy, Scorer, Select

HEADS, HEAD_DIM, WIDTH, AXES = 6, 16, 8, 3


def tokens(count: int, heads: int = HEADS, head_dim: int = HEAD_DIM, seed: int = 0) -> np.ndarray:
    """Heads of different size and direction, so that entropies spread."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 3, (count, heads, 1))
    common = rng.standard_normal((count, 1, head_dim)) * rng.uniform(0, 4, (count, 1, 1))
    return (rng.standard_normal((count, heads, head_dim)) * scale + common).astype(np.float32)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)


def prune_model(policy: Policy, opset: int = 20, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """One EntropyPrune node between graph inputs and outputs."""
    function, attributes = prune_function(policy, heads=HEADS, degree=16, opset=opset)
    kinds = {
        "states": (dtype, (1, "S", HEADS, HEAD_DIM)),
        "hidden": (dtype, (1, "S", WIDTH)),
        "position_ids": (ir.DataType.INT64, (AXES, 1, "S")),
        "visual_index": (ir.DataType.INT64, ("N",)),
        "keep_slots": (ir.DataType.INT64, ("k",)),
    }
    inputs = [ir.Value(name=n, type=ir.TensorType(t), shape=ir.Shape(s)) for n, (t, s) in kinds.items()]
    node = ir.node("EntropyPrune", inputs, attributes, domain="ep_export", num_outputs=3)
    results = {
        "kept_hidden": (dtype, (1, "M", WIDTH)),
        "kept_position_ids": (ir.DataType.INT64, (AXES, 1, "M")),
        "kept_index": (ir.DataType.INT64, ("M",)),
    }
    for value, (name, (kind, shape)) in zip(node.outputs, results.items(), strict=True):
        value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(shape)
    graph = ir.Graph(
        inputs, node.outputs, nodes=[node], opset_imports={"": opset, "ep_export": 1}, name="prune"
    )
    return ir.Model(graph, ir_version=10, functions=[function])


def prune(policy: Policy, states: np.ndarray, visual: np.ndarray, keep: int, **options: int) -> np.ndarray:
    """kept_index, after checking that the other outputs are gathered with it."""
    length = states.shape[0]
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((1, length, WIDTH)).astype(np.float32)
    positions = rng.integers(0, 999, (AXES, 1, length))
    feeds = {
        "states": states[None],
        "hidden": hidden,
        "position_ids": positions,
        "visual_index": visual,
        "keep_slots": np.zeros(keep, dtype=np.int64),
    }
    kept_hidden, kept_positions, index = run(prune_model(policy, **options), feeds)
    np.testing.assert_array_equal(kept_hidden, hidden[:, index])
    np.testing.assert_array_equal(kept_positions, positions[:, :, index])
    return index


@pytest.mark.parametrize("scorer", list(Scorer), ids=lambda s: s.value)
def test_scores_follow_the_exact_ones(scorer: Scorer) -> None:
    states = tokens(200)
    states[3], states[4] = 0, states[4, :1]  # nothing at all, and all heads equal
    got = run(scores_model(HEADS, HEAD_DIM, scorer, DEFAULT_DEGREE), {"states": states})[0]
    series = series_scores(torch.from_numpy(states), scorer, DEFAULT_DEGREE).numpy()
    exact = token_scores(torch.from_numpy(states), scorer).numpy()
    np.testing.assert_allclose(got, series, rtol=2e-5, atol=2e-5)  # float32 rounding
    # What the series leaves out: up to 0.002 for entropies; nothing for the other scores.
    truncation = (
        2e-3 * np.maximum(1, np.abs(exact).max()) if scorer in (Scorer.PAPER, Scorer.RELEASED) else 1e-4
    )
    np.testing.assert_allclose(got, exact, atol=truncation, rtol=1e-5)
    assert np.corrcoef(np.argsort(np.argsort(got)), np.argsort(np.argsort(exact)))[0, 1] > 0.99


def test_one_head_has_no_entropy() -> None:
    for scorer in (Scorer.PAPER, Scorer.RELEASED, Scorer.ORDER2):
        got = run(scores_model(1, HEAD_DIM, scorer, 16), {"states": tokens(5, heads=1)})[0]
        np.testing.assert_array_equal(got, np.zeros(5))


@pytest.mark.parametrize("budget", list(Budget), ids=lambda b: b.value)
@pytest.mark.parametrize("select", list(Select), ids=lambda s: s.value)
@pytest.mark.parametrize("scorer", list(Scorer), ids=lambda s: s.value)
def test_selection_follows_the_rule(scorer: Scorer, select: Select, budget: Budget) -> None:
    states = tokens(70)
    visual = np.r_[4:24, 25:59].astype(np.int64)  # two pictures
    keep = 17
    scores = run(scores_model(HEADS, HEAD_DIM, scorer, 16), {"states": states[visual]})[0]
    chosen = select_tokens(scores, keep, select=select, visual_index=visual, budget=budget)
    expected = np.sort(np.r_[np.setdiff1d(np.arange(70), visual), chosen])
    index = prune(Policy(1, scorer=scorer, select=select, budget=budget), states, visual, keep)
    np.testing.assert_array_equal(index, expected)


@pytest.mark.parametrize("select", list(Select), ids=lambda s: s.value)
def test_scores_that_are_not_finite_are_dropped_first(select: Select) -> None:
    states = tokens(20)
    states[7, 0, 0], states[9, 1, 2], states[11] = np.nan, np.inf, 3e38
    visual = np.arange(5, 15, dtype=np.int64)
    index = prune(Policy(1, scorer=Scorer.NORM, select=select), states, visual, 7)
    assert sorted(set(range(20)) - set(index.tolist())) == [7, 9, 11]


@pytest.mark.parametrize("select", list(Select), ids=lambda s: s.value)
def test_ties_keep_the_lower_positions(select: Select) -> None:
    states = np.tile(tokens(1), (12, 1, 1))
    index = prune(Policy(1, select=select), states, np.arange(2, 12, dtype=np.int64), 4)
    assert index.tolist() == [0, 1, 2, 3, 4, 5]


def test_one_position_of_one_is_a_decode_step() -> None:
    assert prune(Policy(1), tokens(1), np.zeros(1, dtype=np.int64), 1).tolist() == [0]


def test_everything_can_be_kept_of_a_prompt_longer_than_topk_allows_in_tensorrt() -> None:
    index = prune(Policy(1, scorer=Scorer.NORM), tokens(5000), np.arange(4990, 5000, dtype=np.int64), 10)
    np.testing.assert_array_equal(index, np.arange(5000))


def test_modern_opset_gives_the_same_positions() -> None:
    states, visual = tokens(40), np.arange(3, 33, dtype=np.int64)
    np.testing.assert_array_equal(
        prune(Policy(1), states, visual, 9, opset=23), prune(Policy(1), states, visual, 9)
    )


def test_half_precision_states_are_scored_in_float32() -> None:
    states, visual = tokens(40).astype(np.float16), np.arange(3, 33, dtype=np.int64)
    feeds = {
        "states": states[None],
        "hidden": np.zeros((1, 40, WIDTH), dtype=np.float16),
        "position_ids": np.zeros((AXES, 1, 40), dtype=np.int64),
        "visual_index": visual,
        "keep_slots": np.zeros(9, dtype=np.int64),
    }
    index = run(prune_model(Policy(1), dtype=ir.DataType.FLOAT16), feeds)[2]
    np.testing.assert_array_equal(index, prune(Policy(1), states.astype(np.float32), visual, 9))


def test_the_body_can_be_stripped_and_the_node_stays(tmp_path: Path) -> None:
    ir.save(prune_model(Policy(1)), tmp_path / "with.onnx")
    strip_body(tmp_path / "with.onnx", tmp_path / "without.onnx")
    stripped = onnx.load(tmp_path / "without.onnx")
    assert not stripped.functions
    (node,) = stripped.graph.node
    found = {a.name: a.s.decode() for a in node.attribute}
    assert (node.domain, node.op_type) == ("ep_export", "EntropyPrune")
    assert (found["plugin_namespace"], found["plugin_version"], found["scorer"]) == (
        "ep_export",
        "1",
        "paper",
    )

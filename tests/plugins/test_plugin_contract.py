"""What the exporter writes is what the plugin reads: names, inputs, outputs, attributes and their values."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from plugin_reference import ROOT, HostLibrary

SOURCE = (ROOT / "plugins" / "entropy_prune" / "plugin.cpp").read_text(encoding="utf-8")
HEADER = (ROOT / "plugins" / "entropy_prune" / "plugin.h").read_text(encoding="utf-8")


def listed(name: str) -> tuple[str, ...]:
    """The strings of a constexpr array of plugin.cpp."""
    array = re.search(rf"{name}\{{(.*?)\}};", SOURCE, re.DOTALL)
    assert array is not None
    return tuple(re.findall(r'"(\w+)"', array.group(1)))


def enumerated(name: str) -> tuple[str, ...]:
    """The members of an enum of plugin.h in snake case, without the count that closes it."""
    members = re.search(rf"enum {name} : int32_t {{(.*?)}};", HEADER, re.DOTALL)
    assert members is not None
    *names, _ = re.findall(r"k(\w+)", members.group(1))
    return tuple(re.sub(r"(?<!^)(?=[A-Z])", "_", member).lower() for member in names)


def test_policies_are_the_plugins_values():
    from ep_export.policy import Budget, Scorer, Select

    assert listed("kScorers") == tuple(scorer.value for scorer in Scorer)
    assert listed("kSelects") == tuple(select.value for select in Select)
    assert listed("kBudgets") == tuple(budget.value for budget in Budget)


def test_the_exported_node_names_the_plugin_and_its_fields():
    pytest.importorskip("onnx_ir")
    from ep_export.choosers.top_k import DOMAIN, OP_TYPE, prune_function
    from ep_export.policy import Budget, Scorer, Select, Source, TopK

    constants = dict(re.findall(r'constexpr char const\* kPlugin(\w+) = "(\w+)";', HEADER))
    fields = set(re.findall(r'PluginField\{"(\w+)", nullptr', SOURCE))
    for scorer in Scorer:
        chooser = TopK(scorer, Select.LOWEST, Source.QUERY, Budget.PER_PICTURE)
        function, attributes = prune_function(chooser, heads=4, degree=16)
        assert (constants["Name"], constants["Namespace"]) == (OP_TYPE, DOMAIN)
        assert attributes.pop("plugin_namespace") == constants["Namespace"]
        assert attributes.pop("plugin_version") == constants["Version"]
        assert set(attributes) == fields == {"scorer", "select", "budget"}
        assert attributes == {"scorer": scorer.value, "select": "lowest", "budget": "per_picture"}
        assert tuple(value.name for value in function.inputs) == listed("kInputNames") == enumerated("Input")
        assert tuple(value.name for value in function.outputs) == enumerated("Output")


def test_an_exported_file_carries_that_node(tiny_bundle):
    onnx_ir = pytest.importorskip("onnx_ir")
    [path] = Path(tiny_bundle.path).glob("prune_0.*.onnx")
    graph = onnx_ir.load(path).graph
    [node] = [node for node in graph if node.op_type == "EntropyPrune"]
    assert node.domain == "ep_export"
    assert {name for name in node.attributes if not name.startswith("plugin_")} == {
        "scorer",
        "select",
        "budget",
    }
    assert node.attributes["plugin_namespace"].as_string() == "ep_export"
    assert node.attributes["plugin_version"].as_string() == "2"
    assert tuple(value.name for value in graph.inputs) == listed("kInputNames")
    assert list(node.inputs) == list(graph.inputs)
    assert tuple(value.name for value in graph.outputs) == enumerated("Output")
    assert list(node.outputs) == list(graph.outputs)


def test_the_nodes_body_gives_what_the_plugin_gives(tiny_bundle, host: HostLibrary):
    """Given the body's scores, the plugin's selection fills the three index outputs alike."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from ep_export.policy import DEFAULT_DEGREE

    [path] = Path(tiny_bundle.path).glob("prune_0.*.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    heads, dim = session.get_inputs()[0].shape[2:]
    width, axes = session.get_inputs()[1].shape[2], session.get_inputs()[2].shape[0]
    rng = np.random.default_rng(3)
    visual_index = np.array([*range(4, 34), *range(36, 50)], np.int64)
    states = rng.standard_normal((1, 57, heads, dim)).astype(np.float32)
    states[0, [5, 40], 1, 2] = np.nan, np.inf
    feeds = {
        "states": states,
        "hidden": rng.standard_normal((1, 57, width)).astype(np.float32),
        "position_ids": rng.integers(0, 99, (axes, 1, 57)),
        "visual_index": visual_index,
        "keep_slots": np.zeros(12, np.int64),
    }
    outputs = dict(zip(enumerated("Output"), session.run(None, feeds), strict=True))
    scores, _ = host.scores(states[0, visual_index], "paper")
    assert np.array_equal(np.isfinite(outputs["scores"]), np.isfinite(scores))
    # 0.4 / degree an eigenvalue is what `entropy_series` grants the body, which has none.
    assert np.nanmax(np.abs(outputs["scores"] - scores)) < heads * 0.4 / DEFAULT_DEGREE
    kept, kept_visual = host.select(outputs["scores"], visual_index, 57, 12, "highest", "joint")
    assert np.array_equal(outputs["kept_index"], kept)
    assert np.array_equal(outputs["kept_visual_index"], kept_visual)
    assert np.array_equal(outputs["kept_hidden"], feeds["hidden"][:, kept])
    assert np.array_equal(outputs["kept_position_ids"], feeds["position_ids"][:, :, kept])

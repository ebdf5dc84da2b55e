"""What the exporter writes is what the plugin reads: names, inputs, attributes and their values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCE = (Path(__file__).resolve().parents[2] / "plugins" / "entropy_prune" / "plugin.cpp").read_text(
    encoding="utf-8"
)
HEADER = (Path(__file__).resolve().parents[2] / "plugins" / "entropy_prune" / "plugin.h").read_text(
    encoding="utf-8"
)


def listed(name: str) -> tuple[str, ...]:
    """The strings of a constexpr array of plugin.cpp."""
    found = re.search(rf"{name}\{{(.*?)\}};", SOURCE, re.DOTALL)
    assert found is not None
    return tuple(re.findall(r'"(\w+)"', found.group(1)))


def test_policies_are_the_plugins_values():
    from ep_export.policy import Budget, Scorer, Select

    assert listed("kScorers") == tuple(scorer.value for scorer in Scorer)
    assert listed("kSelects") == tuple(select.value for select in Select)
    assert listed("kBudgets") == tuple(budget.value for budget in Budget)


def test_the_exported_node_names_the_plugin_and_its_fields():
    pytest.importorskip("onnx_ir")
    from ep_export.export.prune_node import DOMAIN, OP_TYPE, prune_function
    from ep_export.policy import Budget, Policy, Scorer, Select

    constants = dict(re.findall(r'constexpr char const\* kPlugin(\w+) = "(\w+)";', HEADER))
    fields = set(re.findall(r'PluginField\{"(\w+)", nullptr', SOURCE))
    for scorer in Scorer:
        policy = Policy(2, scorer, Select.LOWEST, budget=Budget.PER_PICTURE)
        function, attributes = prune_function(policy, heads=4, degree=16)
        assert (constants["Name"], constants["Namespace"]) == (OP_TYPE, DOMAIN)
        assert attributes.pop("plugin_namespace") == constants["Namespace"]
        assert attributes.pop("plugin_version") == constants["Version"]
        assert set(attributes) == fields == {"scorer", "select", "budget"}
        assert attributes == {"scorer": scorer.value, "select": "lowest", "budget": "per_picture"}
        assert tuple(value.name for value in function.inputs) == listed("kInputNames")
        assert [value.name for value in function.outputs] == [
            "kept_hidden",
            "kept_position_ids",
            "kept_index",
        ]


@pytest.mark.parametrize("component", ["decoder_head"])
def test_an_exported_file_carries_that_node(tiny_bundle, component):
    onnx_ir = pytest.importorskip("onnx_ir")
    [path] = sorted(Path(tiny_bundle.path).glob(f"{component}*.onnx"))
    [node] = [node for node in onnx_ir.load(path).graph if node.op_type == "EntropyPrune"]
    assert node.domain == "ep_export"
    assert {name for name in node.attributes if not name.startswith("plugin_")} == {
        "scorer",
        "select",
        "budget",
    }
    assert node.attributes["plugin_namespace"].as_string() == "ep_export"
    assert node.attributes["plugin_version"].as_string() == "1"
    assert (len(node.inputs), len(node.outputs)) == (5, 3)

"""`ep-export inspect`: what a bundle is, and that it says "match" only of what was compared."""

from __future__ import annotations

import json
import shutil

import pytest
from bundles import export_tiny, two_cuts
from command_line import ep_export

from ep_export.bundle import Bundle
from ep_export.numerics import RoundingCost
from ep_export.policy import Random


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("inspect") / "bundle"
    return export_tiny(tiny_checkpoint, out, schedule=two_cuts(1, 3), keep=0.6, policies=(Random(4),)).path


def test_components_are_listed_with_role_layers_and_policy(bundle):
    said = ep_export("inspect", str(bundle))
    assert said.code == 0, said.err
    rows = [line.split() for line in said.out.splitlines()]
    assert ["decoder_1", "decoder", "1", "to", "2"] in [row[:5] for row in rows]
    assert ["prune_0.paper-highest", "prune", "before", "1", "paper-highest"] in [row[:5] for row in rows]
    assert ["prune_1.random-4", "prune", "before", "3", "random-4"] in [row[:5] for row in rows]
    assert "paper-highest, random-4" in said.out
    assert "sizes and checksums match" in said.out
    assert "layer 3 keeps 30%" in said.out


def test_without_verifying_it_says_so(bundle):
    said = ep_export("inspect", str(bundle), "--no-verify")
    assert said.code == 0, said.err
    assert "sizes match, checksums not computed" in said.out


@pytest.mark.parametrize("file", ["", ".", "decoder_9.onnx", "weights"])
def test_a_component_that_is_no_file_of_the_bundle_does_not_match(bundle, tmp_path, file):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    (component,) = (each for each in manifest["components"] if each["name"] == "decoder_0")
    component["file"] = file
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for options in ((), ("--json",)):
        said = ep_export("inspect", str(copy), *options)
        assert said.code == 1
        assert "match" not in said.out
        assert "component decoder_0" in said.err
        assert "hint: " in said.err


def test_one_policy_of_a_bundle_is_validated_from_the_command_line(bundle, tmp_path):
    said = ep_export(
        "validate", str(bundle), "--policy", "random-4", "--max-new-tokens", "2", "--report", str(tmp_path)
    )
    assert said.code == 0, said.err
    assert "pruned by random-4" in said.out.splitlines()[-1]
    assert "random tokens, seed 4" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_rounding_the_weights_cost_is_told(bundle, tmp_path):
    copy = Bundle.open(shutil.copytree(bundle, tmp_path / "bundle"))
    cost = RoundingCost("quantised and pruned", kl=0.00123, agreement=0.985, positions=200)
    copy = copy.with_verified("here", "PASS", (cost,))
    copy.with_verified("elsewhere", "PASS")  # says nothing of it
    said = ep_export("inspect", str(copy.path))
    assert said.code == 0, said.err
    line = next(line for line in said.out.splitlines() if "both cost" in line)
    assert "KL 1.2e-03, same top token at 98.5%" in line
    reported = json.loads(ep_export("inspect", str(copy.path), "--json").out)
    assert reported["rounding"][0]["kl"] == 0.00123

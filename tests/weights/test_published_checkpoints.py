"""Checkpoints as they are published quantised: read, exported, run, and equal to what their format means."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from bundles import export_tiny
from family_pair import FamilyPair
from published_layouts import LAYOUTS, publish
from tiny import make_tiny, tiny_picture
from tiny_families import TINY_FAMILIES

from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.policy import MaxMin
from ep_export.reference import load_model
from ep_export.validate import validate
from ep_export.weights.packing import nearest
from ep_export.weights.store import bundle_layers, read_layer

RUNNABLE = [layout for layout in LAYOUTS if layout != "float8"]  # no kernel on a CPU


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_what_the_format_says(source, tmp_path, layout):
    worth = publish(source, tmp_path / "model", layout)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert set(checkpoint.packed) == set(worth)
    parameters = dict(load_model(checkpoint).named_parameters())
    for name, expected in worth.items():
        assert torch.equal(parameters[name], expected), name
    bundle = export_tiny(tmp_path / "model", tmp_path / "bundle", layer=2, chooser=MaxMin())
    stored = bundle_layers(bundle)
    for name, expected in worth.items():
        assert torch.equal(torch.from_numpy(read_layer(stored[name]).dequantised()).T, expected), name


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    return functools.cache(lambda family: TINY_FAMILIES[family](tmp_path_factory.mktemp(family) / "model"))


@pytest.mark.parametrize("layout", RUNNABLE)
@pytest.mark.parametrize("family", sorted(set(TINY_FAMILIES) - {"idefics3"}))  # as smolvlm
def test_every_family_answers_as_its_dequantised_model(family, layout, source_of, tmp_path):
    """Unpruned token for token; pruned with kept sets that the oracle agrees with."""
    publish(source_of(family), tmp_path / "model", layout)
    pair = FamilyPair(tmp_path / "model", tmp_path / "bundle", layer=1, chooser=MaxMin())
    pair.check_everything_kept([tiny_picture(60, 60)])
    pair.check_pruned([tiny_picture(60, 60)])


def test_layers_that_were_left_as_they_are_stay_so(source, tmp_path):
    publish(source, tmp_path / "model", "gptq", skip=("layers.0.", "down_proj"))
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert checkpoint.packed
    assert not [name for name in checkpoint.packed if "layers.0." in name or "down_proj" in name]
    bundle = export_tiny(tmp_path / "model", tmp_path / "bundle", layer=2)
    report = validate(
        bundle, checkpoint, pictures=[tiny_picture(112, 84)], prompts=["what is this"], max_new_tokens=4
    )
    assert report.verdict.value in {"PASS", "AMBIGUOUS"}, report.sentence


def test_rounding_it_again_is_refused(source, tmp_path):
    publish(source, tmp_path / "model", "awq")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    weights = checkpoint.published.weights
    with pytest.raises(UserError, match="quantized already, by awq") as caught:
        export_tiny(
            tmp_path / "model",
            tmp_path / "bundle",
            layer=2,
            packing=nearest(checkpoint.tensors, weights, compute="fp32"),
        )
    assert "--weights" in caught.value.hint


@pytest.mark.parametrize(
    ("quantization", "message"),
    [("awq", "no object"), (None, None), ({"quant_method": "bitsandbytes"}, "bitsandbytes")],
)
def test_a_config_that_names_something_else(source, tmp_path, quantization, message):
    publish(source, tmp_path / "model", "awq")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = quantization
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message or "unknown to its own config") as caught:
        open_checkpoint(str(tmp_path / "model"))
    assert caught.value.hint

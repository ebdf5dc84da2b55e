"""Kits of quantised bundles, and what TensorRT takes of them, said early. No GPU: see kit_device.py."""

from __future__ import annotations

import sys

import onnx_ir as ir
import pytest
from bundles import export_tiny
from kit_device import JETPACK6, Device, make_kit
from tiny import make_tiny

from ep_export.bundle import Bundle, Precision
from ep_export.checkpoint import open_checkpoint
from ep_export.engine.checks import check_stored
from ep_export.engine.kit_files import needs_of
from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.targets import find_target
from ep_export.weights.packing import nearest
from ep_export.weights.store import FILE, bundle_layers

FOUR = Weights(WeightKind.INT4, 64, "nearest")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    checkpoint = make_tiny(root / "model", layers=2, vision_depth=2)
    packing = nearest(open_checkpoint(str(checkpoint)).tensors, FOUR, compute="fp16")
    return export_tiny(checkpoint, root / "bundle", precision=Precision.FP16, packing=packing)


@pytest.fixture(scope="module")
def kit(bundle, tmp_path_factory):
    return make_kit(bundle, tmp_path_factory.mktemp("kit") / "kit", golden=True)


def test_a_kit_builds_and_verifies_with_its_weights_in_4_bits(kit, tmp_path):
    assert (kit / FILE).is_file()
    stored = bundle_layers(Bundle.open(kit))
    model = ir.load(kit / "decoder_1.onnx")
    four = [
        v.const_value for v in model.graph.initializers.values() if v.const_value.dtype is ir.DataType.INT4
    ]
    assert len(four) == 7
    assert {weight.shape.numpy() for weight in four} <= {layer.shape for layer in stored.values()}
    device = Device(tmp_path / "device", environment={"PYTHON": sys.executable})
    result = device.run(kit, "build.sh")
    assert result.returncode == 0, result.stderr
    # Polygraphy with ONNX Runtime itself, against golden outputs of the dequantised model
    cases = ("--case", "decoder_0.prefill", "--case", "decoder_1.decode")
    result = device.run(kit, "verify.sh", "--onnxrt", *cases)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[:-1]] == ["PASS"] * 2


def test_needs_count_the_bits_that_are_stored(bundle):
    spans = bundle.manifest.spans
    stored = bundle_layers(bundle).values()
    packed = sum(layer.codes.length + layer.scales.length for layer in stored)
    needs = needs_of(bundle, spans)
    norms = 2 * (2 * 2 * 64 + 64) + 2 * 2 * (64 + 2 * 32)  # and biases of query, key and value, in float16
    assert needs.disk_bytes == pytest.approx(1.1 * (packed + norms) + (256 << 20), abs=2)


@pytest.mark.parametrize("group", [32, 16, None])
def test_blocks_that_tensorrt_does_not_take_are_refused(group):
    with pytest.raises(UserError, match=r"expected for .* groups of 64 or 128") as caught:
        check_stored(Weights(WeightKind.INT4, group, "awq"), find_target(JETPACK6), "the bundle")
    assert "--group 128" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "group", "target"),
    [
        (WeightKind.INT4, 64, JETPACK6),
        (WeightKind.INT8, None, JETPACK6),
        (WeightKind.INT4, 32, "rtx-ada"),
        (WeightKind.INT4, 16, "cpu"),
    ],
)
def test_what_compilers_take_passes(kind, group, target):
    check_stored(Weights(kind, group, "nearest"), find_target(target), "the bundle")
    check_stored(None, find_target(target), "the bundle")


@pytest.mark.parametrize(("kind", "target"), [(WeightKind.FP8, JETPACK6), (WeightKind.INT4, "rtx-turing")])
def test_types_without_products_are_refused(kind, target):
    with pytest.raises(UserError, match=f"stores weights in {kind.value}, which {target}.* cannot multiply"):
        check_stored(Weights(kind, None, "nearest"), find_target(target), "the bundle")

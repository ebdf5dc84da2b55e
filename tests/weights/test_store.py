"""Quantised layers survive the disk, and a shard that was tampered with is refused."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open

from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.weights.packed import PackedLinear
from ep_export.weights.rounding import round_nearest
from ep_export.weights.store import LayerWriter, read_layer, stored_layers


@pytest.fixture
def layers():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 24)).astype(np.float32)
    plain = {
        kind.value: round_nearest(weight, Weights(kind, 32 if kind is WeightKind.INT4 else None, "nearest"))
        for kind in WeightKind
    }
    zeros = rng.integers(-8, 8, plain["int4"].scales.shape).astype(np.int8)
    order = rng.permutation(64)
    plain["uneven"] = PackedLinear(WeightKind.INT4, plain["int4"].codes, plain["int4"].scales, zeros, order)
    return plain


@pytest.mark.parametrize("scale_type", ["float32", "float16"])
def test_layers_read_back_as_written(layers, tmp_path, scale_type):
    file = tmp_path / "own.safetensors"
    with LayerWriter(file, layers=9, scale_type=scale_type) as writer:
        written = {name: writer.add(name, linear) for name, linear in layers.items()}
    assert stored_layers([file]) == written
    for name, linear in layers.items():
        back = read_layer(written[name])
        assert np.array_equal(back.codes, linear.codes)
        assert np.array_equal(back.dequantised(), linear.dequantised())


def test_the_file_is_one_that_safetensors_reads(layers, tmp_path):
    file = tmp_path / "own.safetensors"
    with LayerWriter(file, layers=4, scale_type="float16") as writer:
        for name, linear in layers.items():
            writer.add(name, linear)
    with safe_open(file, framework="np") as shard:
        assert shard.get_tensor("int8.codes").tolist() == layers["int8"].codes.tolist()
        assert shard.get_tensor("uneven.order").tolist() == layers["uneven"].order.tolist()
        assert shard.get_tensor("int4.scales").dtype == np.float16


def test_the_data_are_where_the_reference_says(layers, tmp_path):
    file = tmp_path / "own.safetensors"
    with LayerWriter(file, layers=4, scale_type="float32") as writer:
        ref = writer.add("int8", layers["int8"]).codes
    assert file.read_bytes()[ref.offset : ref.offset + ref.length] == layers["int8"].codes.tobytes()


def test_interrupted_work_leaves_nothing(layers, tmp_path):
    file = tmp_path / "own.safetensors"
    with pytest.raises(KeyboardInterrupt), LayerWriter(file, layers=4, scale_type="float32") as writer:
        writer.add("int8", layers["int8"])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.codes": np.zeros((8, 4), np.uint8)}, "expected codes and scales"),
        ({"a.other": np.zeros((8, 4), np.uint8)}, "no part of a layer"),
        ({"a.codes": np.zeros((8, 4), np.int16), "a.scales": np.ones((1, 8), np.float32)}, "codes of type"),
        ({"a.codes": np.zeros((8, 4), np.int8), "a.scales": np.ones((3, 4), np.float32)}, "do not fit"),
        ({"a.codes": np.zeros((8, 4), np.int8), "a.scales": np.ones((0, 4), np.float32)}, "do not fit"),
        (
            {
                "a.codes": np.zeros((8, 4), np.int8),
                "a.scales": np.ones((1, 4), np.float32),
                "a.order": np.zeros(7, np.int64),
            },
            "do not fit",
        ),
    ],
)
def test_tensors_that_make_no_layer_are_refused(tmp_path, tensors, message):
    from safetensors.numpy import save_file

    save_file(tensors, tmp_path / "own.safetensors")
    with pytest.raises(UserError, match=message):
        stored_layers([tmp_path / "own.safetensors"])

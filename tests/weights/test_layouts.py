"""Published layouts, packed here word by word after their definitions, come back as what they mean."""

from __future__ import annotations

import numpy as np
import pytest
from published_layouts import AWQ_ORDER, along_columns, along_rows

from ep_export.errors import UserError
from ep_export.numerics import WeightKind
from ep_export.weights.layouts import from_awq, from_channels, from_gptq, from_pack_quantized

INPUTS, OUTPUTS, GROUP = 64, 24, 16
SHAPE = (INPUTS, OUTPUTS)


@pytest.fixture
def layer():
    """Unsigned codes [in, out], zeros [in/g, out], float16 scales [in/g, out]."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, SHAPE)
    zeros = rng.integers(1, 16, (INPUTS // GROUP, OUTPUTS))
    scales = rng.uniform(0.001, 0.1, (INPUTS // GROUP, OUTPUTS)).astype(np.float16)
    return codes, zeros, scales


def half(codes, zeros, scales, groups):
    """(code - zero) scale in float16, as the formats define it."""
    rows = [(codes[i] - zeros[g]).astype(np.float16) * scales[g] for i, g in enumerate(groups)]
    return np.array(rows, dtype=np.float16)


PLAIN = np.arange(INPUTS) // GROUP


def test_awq_is_its_definition_bit_for_bit(layer):
    codes, zeros, scales = layer
    tensors = {
        "qweight": along_columns(codes, AWQ_ORDER),
        "qzeros": along_columns(zeros, AWQ_ORDER),
        "scales": scales,
    }
    linear = from_awq("layer", tensors, shape=SHAPE)
    assert linear.zeros is not None
    assert linear.group == GROUP
    assert np.array_equal(linear.dequantised(np.float16), half(codes, zeros, scales, PLAIN))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("reordered", [False, True])
def test_gptq_of_both_versions_with_and_without_reordered_inputs(layer, offset, reordered):
    codes, zeros, scales = layer
    groups = np.random.default_rng(5).permutation(PLAIN) if reordered else PLAIN
    tensors = {
        "qweight": along_rows(codes),
        "qzeros": along_columns(zeros - offset),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }
    linear = from_gptq("layer", tensors, shape=SHAPE, zero_offset=offset)
    assert (linear.order is not None) == reordered
    assert np.array_equal(linear.dequantised(np.float16), half(codes, zeros, scales, groups))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_pack_quantized_of_both_kinds(layer, asymmetric):
    codes, zeros, scales = layer
    tensors = {"weight_packed": along_columns(codes.T), "weight_scale": np.ascontiguousarray(scales.T)}
    if asymmetric:
        tensors["weight_zero_point"] = along_rows(zeros.T)
    linear = from_pack_quantized("layer", tensors, shape=SHAPE)
    assert (linear.zeros is not None) == asymmetric
    middle = zeros if asymmetric else np.full_like(zeros, 8)
    assert np.array_equal(linear.dequantised(np.float16), half(codes, middle, scales, PLAIN))


def test_zeros_in_the_middle_are_no_zeros_at_all(layer):
    codes, zeros, scales = layer
    tensors = {
        "qweight": along_rows(codes),
        "qzeros": along_columns(np.full_like(zeros, 8) - 1),
        "scales": scales,
    }
    assert from_gptq("layer", tensors, shape=SHAPE, zero_offset=1).zeros is None


def test_channels_of_int8_and_float8():
    import ml_dtypes

    rng = np.random.default_rng(0)
    scales = rng.uniform(0.01, 0.1, (OUTPUTS, 1)).astype(np.float32)
    ints = rng.integers(-128, 128, (OUTPUTS, INPUTS)).astype(np.int8)
    linear = from_channels("l", {"weight": ints, "weight_scale": scales}, shape=SHAPE, kind=WeightKind.INT8)
    assert np.array_equal(linear.dequantised(), (ints * scales).T.astype(np.float32))
    floats = rng.standard_normal((OUTPUTS, INPUTS)).astype(ml_dtypes.float8_e4m3fn)
    raw = {"weight": floats.view(np.uint8), "weight_scale": np.array([0.5], np.float32)}
    linear = from_channels("l", raw, shape=SHAPE, kind=WeightKind.FP8)
    assert np.array_equal(linear.dequantised(), floats.astype(np.float32).T * np.float32(0.5))
    raw["weight"] = np.full((OUTPUTS, INPUTS), 0x7F, np.uint8)
    with pytest.raises(UserError, match="not numbers"):
        from_channels("l", raw, shape=SHAPE, kind=WeightKind.FP8)


def gptq_tensors(layer):
    codes, zeros, scales = layer
    return {
        "qweight": along_rows(codes),
        "qzeros": along_columns(zeros),
        "scales": scales,
        "g_idx": PLAIN.astype(np.int32),
    }


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", None, "has no tensor qweight"),
        ("qweight", np.zeros((7, OUTPUTS), np.int32), r"expected \[8, 24\]"),
        ("qweight", np.zeros((8, OUTPUTS), np.float32), r"is float32"),
        ("qzeros", np.zeros((4, 4), np.int32), r"expected \[4, 3\]"),
        ("scales", np.zeros((4, OUTPUTS), np.float16), "0 or not finite"),
        ("scales", np.full((4, OUTPUTS), np.inf, np.float16), "0 or not finite"),
        ("scales", np.full((4, OUTPUTS), np.nan, np.float16), "0 or not finite"),
        ("scales", np.full((4, OUTPUTS), -1, np.float16), "negative scales"),
        ("scales", np.ones((5, OUTPUTS), np.float16), "fits no layer"),
        ("scales", np.ones((0, OUTPUTS), np.float16), "fits no layer"),
        ("scales", np.ones(OUTPUTS, np.float16), "fits no layer"),
        ("g_idx", np.full(INPUTS, 4, np.int32), "expected 64 groups from 0 to 3"),
        ("g_idx", np.full(INPUTS, -1, np.int32), "expected 64 groups from 0 to 3"),
        ("g_idx", np.zeros(INPUTS, np.int32), "groups of different sizes"),
        ("g_idx", np.zeros(3, np.int32), "expected 64 groups"),
    ],
)
def test_a_broken_tensor_is_one_sentence(layer, part, value, message):
    tensors = gptq_tensors(layer)
    if value is None:
        del tensors[part]
    else:
        tensors[part] = value
    with pytest.raises(UserError, match=message) as caught:
        from_gptq("layer", tensors, shape=SHAPE, zero_offset=0)
    assert caught.value.hint


def test_a_layer_that_words_do_not_divide_is_refused(layer):
    with pytest.raises(UserError, match="words of 8 codes do not divide"):
        from_gptq(
            "layer",
            {**gptq_tensors(layer), "scales": np.ones((1, 24), np.float16)},
            shape=(60, 24),
            zero_offset=0,
        )

"""Rounding without and with data, against what the scales and the paper promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.weights.gptq_rounding import Moments, round_calibrated
from ep_export.weights.packed import nibbles, unpack_nibbles
from ep_export.weights.rounding import round_nearest

INT4 = WeightKind.INT4


@pytest.fixture
def weight():
    return (np.random.default_rng(0).standard_normal((256, 48)) / 16).astype(np.float32)


@pytest.fixture
def activations():
    """Inputs that hang together, as those of real layers do."""
    rng = np.random.default_rng(1)
    few = rng.standard_normal((2000, 32)) @ rng.standard_normal((32, 256))
    return (few + 0.3 * rng.standard_normal((2000, 256))).astype(np.float32)


def output_error(linear, weight, activations):
    return np.linalg.norm(activations @ (linear.dequantised() - weight))


@pytest.mark.parametrize(
    ("kind", "group", "steps"), [(INT4, 32, 7), (INT4, 128, 7), (WeightKind.INT8, None, 127)]
)
def test_every_weight_is_within_half_a_step_of_a_code_or_clipped(weight, kind, group, steps):
    linear = round_nearest(weight, Weights(kind, group, "nearest"))
    assert linear.group == (group or 256)
    scales = np.repeat(linear.scales, linear.group, axis=0)
    error = np.abs(linear.dequantised() - weight)
    clipped = np.abs(weight) > (steps + 0.5) * scales
    assert (error[~clipped] <= scales[~clipped] * 0.5001).all()
    assert clipped.mean() < 0.05
    assert np.array_equal(linear.scales, linear.scales.astype(np.float16))  # as they are stored


def test_the_search_for_a_scale_is_never_worse_than_the_largest_weight(weight):
    linear = round_nearest(weight, Weights(INT4, 64, "nearest"))
    blocks = weight.reshape(4, 64, -1)
    plain = (np.abs(blocks).max(axis=1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    rounded = np.clip(np.rint(blocks / plain), -8, 7) * plain

    def error(values):
        return (np.abs(values.reshape(blocks.shape) - blocks) ** 2.5).sum(axis=1)

    assert (error(linear.dequantised()) <= error(rounded) * (1 + 1e-6)).all()
    assert error(linear.dequantised()).sum() < 0.95 * error(rounded).sum()


def test_float8_is_the_nearest_of_its_numbers(weight):
    import ml_dtypes

    linear = round_nearest(weight, Weights(WeightKind.FP8, None, "nearest"))
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = every[np.isfinite(every)]
    for column in range(0, 48, 7):
        scaled = weight[:, column] / linear.scales[0, column]
        nearest = np.abs(scaled[:, None] - every).min(axis=1)
        found = np.abs(linear.dequantised()[:, column] / linear.scales[0, column] - scaled)
        assert np.allclose(found, nearest, atol=1e-4)


@pytest.mark.parametrize("group", [32, 128, 256])
def test_calibrated_rounding_changes_outputs_far_less(weight, activations, group):
    settings = Weights(INT4, group, "gptq")
    moments = Moments(256)
    for part in np.array_split(activations, 5):
        moments.add(torch.from_numpy(part))
    calibrated = round_calibrated(weight, moments, settings)
    nearest = round_nearest(weight, settings)
    assert output_error(calibrated, weight, activations) < 0.5 * output_error(nearest, weight, activations)


def test_calibrated_rounding_is_the_papers_algorithm_written_plainly(weight, activations):
    """Row by row with the whole inverse, in float64, scales taken from the tool."""
    moments = Moments(256)
    moments.add(torch.from_numpy(activations))
    linear = round_calibrated(weight, moments, Weights(INT4, 64, "gptq"))
    h = activations.astype(np.float64).T @ activations / len(activations)
    h += 0.01 * np.diag(h).mean() * np.eye(256)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    left = weight.astype(np.float64).copy()
    codes = np.empty(weight.shape)
    for i in range(256):
        scale = linear.scales[i // 64]
        codes[i] = np.clip(np.rint(left[i] / scale), -8, 7)
        error = (left[i] - codes[i] * scale) / u[i, i]
        left[i:] -= u[i, i:, None] * error
    # float32 against float64: a weight near the middle of two codes may fall to the other side
    assert (codes == linear.codes).mean() > 0.98


def test_what_nothing_ever_entered_is_rounded_to_zero(weight):
    rows = np.random.default_rng(2).standard_normal((500, 256)).astype(np.float32)
    rows[:, [3, 200]] = 0
    moments = Moments(256)
    moments.add(torch.from_numpy(rows))
    linear = round_calibrated(weight, moments, Weights(INT4, 64, "gptq"))
    assert (linear.codes[[3, 200]] == 0).all()


def test_moments_of_several_panels_factor_as_numpys():
    """H = (U + I) D (U + I)', by NumPy in float64 from the plain sum."""
    rows = np.random.default_rng(3).normal(size=(400, 1100)).astype(np.float32)
    moments = Moments(1100)
    moments.add(torch.from_numpy(rows))
    spread = moments.factor()[0].numpy()
    matrix = rows.T.astype(np.float64) @ rows / len(rows)
    matrix += 0.01 * np.diagonal(matrix).mean() * np.eye(1100)
    unit = np.triu(spread.astype(np.float64), 1) + np.eye(1100)
    lower = np.linalg.cholesky(matrix[::-1, ::-1])
    expected = (lower / np.diagonal(lower))[::-1, ::-1]
    np.testing.assert_allclose(unit, expected, atol=1e-5)


def test_rounding_is_the_same_every_time(weight, activations):
    moments = Moments(256)
    moments.add(torch.from_numpy(activations))
    for roundings in (
        [round_nearest(weight, Weights(INT4, 32, "nearest")) for _ in range(2)],
        [round_calibrated(weight, moments, Weights(INT4, 32, "gptq")) for _ in range(2)],
    ):
        assert np.array_equal(roundings[0].codes, roundings[1].codes)


def test_bfloat16_scales_are_numbers_of_bfloat16(weight):
    import ml_dtypes

    linear = round_nearest(weight, Weights(INT4, 64, "nearest"), scale_type="bfloat16")
    assert np.array_equal(linear.scales, linear.scales.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_zero_blocks_stay_zero(weight):
    weight[:128] = 0
    linear = round_nearest(weight, Weights(INT4, 128, "nearest"))
    assert (linear.dequantised()[:128] == 0).all()
    assert (linear.scales > 0).all()


def test_nibbles_are_the_order_of_onnx():
    codes = np.array([[-8, 7, 0, -1], [1, 2, 3, 4]], dtype=np.int8)
    assert nibbles(codes).tolist() == [0x78, 0xF0, 0x21, 0x43]
    assert np.array_equal(unpack_nibbles(nibbles(codes), (2, 4)), codes)


@pytest.mark.parametrize(
    ("rows", "value", "message"), [(100, 0.1, "groups of 64 do not divide"), (128, np.nan, "not finite")]
)
def test_what_cannot_be_rounded_is_one_sentence(rows, value, message):
    weight = np.full((rows, 8), value, dtype=np.float32)
    with pytest.raises(UserError, match=message):
        round_nearest(weight, Weights(INT4, 64, "nearest"), name="layers.0.mlp.down_proj")

"""bfloat16 bits against torch's."""

import numpy as np
import torch

from ep_export.runtime.bfloat16 import narrow, widen


def test_narrowing_rounds_as_torch_does():
    values = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    ties = np.array(
        [1.00390625, 1.01171875, -1.00390625, 3.4e38, 0.0, -0.0, np.inf, -np.inf], dtype=np.float32
    )
    values = np.concatenate([values, ties])
    expected = torch.from_numpy(values).bfloat16()
    assert np.array_equal(narrow(values), expected.view(torch.uint16).numpy())
    assert np.array_equal(widen(narrow(values)), expected.float().numpy())


def test_nan_stays_nan():
    quiet = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(widen(narrow(quiet))).all()

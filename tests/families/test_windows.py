"""The window layout against Hugging Face's."""

import itertools

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from ep_export.families.windows import PADDING, patch_positions, window_layout

# Patches high and wide: exact multiples of a window, ragged, one merge block, very long.
GRIDS = [(16, 16), (10, 14), (2, 2), (4, 42), (42, 4), (18, 8)]


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("side", [2, 4])
def test_windows_hold_the_same_patches_as_huggingface(height, width, side):
    index, _ = window_layout(height, width, side=side, merge_size=2)
    blocks, bounds = get_vision_window_index(torch.tensor([[1, height, width]]), 2, 28 * side, 14)
    patches = (blocks[:, None] * 4 + torch.arange(4)).flatten().numpy()
    expected = [patches[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert index.shape == (len(expected), 4 * side * side)
    for slots, window in zip(index, expected, strict=True):
        assert np.array_equal(np.sort(slots[slots != PADDING]), np.sort(window))


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_the_inverse_finds_every_patch(height, width):
    index, inverse = window_layout(height, width, side=4, merge_size=2)
    assert np.array_equal(index.reshape(-1)[inverse], np.arange(height * width))
    assert (index == PADDING).sum() == index.size - height * width


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_patch_positions_equal_huggingface(height, width):
    expected = get_vision_position_ids(torch.tensor([[1, height, width]]), 2)
    assert np.array_equal(patch_positions(height, width, merge_size=2), expected.numpy())

"""FLOPs and parameters of vision encoders against sums by hand."""

import numpy as np
import pytest

from ep_export.vision_flops import VisionCall, VisionTower, VisionWork

PLAIN = VisionTower(
    patch_values=12, blocks=3, hidden_size=8, heads=2, ffn_size=20, gated=False, joined=4, projector=(32, 5)
)


def brute_force(tower, call):
    """Every product of the network, matrix by matrix."""
    height, width = call.grid
    c, patches = tower.hidden_size, height * width
    rows = patches + tower.class_tokens
    total = 2 * patches * tower.patch_values * c
    for block in range(tower.blocks):
        total += 4 * 2 * rows * c * c
        total += (3 if tower.gated else 2) * 2 * rows * c * tower.ffn_size
        side = None if tower.window_side is None or block < tower.full_blocks else tower.window_side
        lengths = [rows]
        if side:
            where = np.add.outer(np.arange(height) // side * width, np.arange(width) // side)
            lengths = np.unique(where, return_counts=True)[1].tolist()
        total += sum(2 * 2 * length**2 * c for length in lengths)
    rows_out, inputs = patches // tower.joined + tower.class_tokens * tower.class_projected, tower.joined * c
    for outputs in tower.projector:
        total += 2 * rows_out * inputs * outputs
        inputs = outputs
    return call.tiles * total


@pytest.mark.parametrize("grid", [(4, 4), (6, 10), (2, 14), (8, 8)], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": True},
        {"window_side": 4, "full_blocks": 1},
        {"window_side": 8, "full_blocks": 0},
        {"class_tokens": 1, "joined": 1, "projector": (5, 5)},
        {"class_tokens": 1, "class_projected": True, "joined": 1},
    ],
    ids=str,
)
def test_flops_are_the_sum_of_all_products(grid, changes):
    tower = VisionTower(**{**vars(PLAIN), **changes})
    for tiles in (1, 5):
        call = VisionCall(tiles, grid, visual_tokens=0)
        assert tower.flops(call) == brute_force(tower, call)


def test_parameters_are_those_of_every_matrix():
    tower = 12 * 8 + 3 * (4 * 8 * 8 + 2 * 8 * 20)
    projector = 32 * 32 + 32 * 5
    assert PLAIN.parameters == tower + projector
    assert VisionTower(**{**vars(PLAIN), "towers": 2}).parameters == 2 * tower + projector


def test_work_adds_up_and_knows_its_largest_call():
    small, large = VisionCall(1, (4, 6), 6), VisionCall(3, (4, 4), 12)
    work = VisionWork(PLAIN, (small, large, small))
    assert work.flops == 2 * PLAIN.flops(small) + PLAIN.flops(large)
    assert work.visual_tokens == 24
    assert work.largest is large

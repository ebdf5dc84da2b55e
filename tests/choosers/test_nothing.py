"""Keeping nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prune_graphs import prompt, run, session

from ep_export.choosers import KeptDifference, choose, difference
from ep_export.policy import Nothing


@pytest.mark.parametrize("opset", [20, 23])
def test_only_text_stays(opset: int) -> None:
    at = prompt(Nothing(), np.r_[2:9, 11:14], 17)
    opened = session(Nothing(), opset=opset)
    assert [entry.name for entry in opened.get_inputs()] == ["hidden", "position_ids", "visual_index"]
    outputs = run(opened, at, 0)
    assert outputs["kept_index"].tolist() == [0, 1, 9, 10, 14, 15, 16]
    assert outputs["kept_visual_index"].shape == (0,)
    np.testing.assert_array_equal(outputs["kept_hidden"][0], at.hidden[outputs["kept_index"]])
    np.testing.assert_array_equal(outputs["kept_position_ids"], at.positions[:, :, outputs["kept_index"]])
    assert "scores" not in outputs


def test_the_exact_form_keeps_none_and_refuses_to_keep_any() -> None:
    tokens = prompt(Nothing(), np.arange(4), 6).tokens
    choice = choose(Nothing(), tokens, 0)
    assert (choice.kept.tolist(), choice.scores) == ([], None)
    with pytest.raises(ValueError, match="cannot keep 1 tokens with nothing"):
        choose(Nothing(), tokens, 1)


def test_any_kept_token_is_different() -> None:
    tokens = prompt(Nothing(), np.arange(4), 6).tokens
    assert difference(Nothing(), tokens, torch.tensor([], dtype=torch.int64), 0) is KeptDifference.EQUAL
    assert difference(Nothing(), tokens, torch.tensor([2]), 0) is KeptDifference.DIFFERENT

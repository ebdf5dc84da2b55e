"""Tokens kept at random: the floor that a method has to beat."""

from __future__ import annotations

import numpy as np
import torch

from ep_export.methods.contract import Method, Place, TokenView

__all__ = ["RANDOM_TOKENS"]


def _choose(view: TokenView, k: int) -> torch.Tensor:
    drawn = np.sort(view.rng.permutation(view.count)[:k])
    return view.visual_index[torch.from_numpy(drawn).to(view.visual_index.device)]


RANDOM_TOKENS = Method(
    key="random",
    title="Random",
    source="the floor",
    idea="keeps tokens drawn without looking",
    choose=_choose,
    place=Place.ANYWHERE,
    chance=True,
)

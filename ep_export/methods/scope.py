"""SCOPE (Deng et al., NeurIPS 2025, arXiv 2510.24214): salient tokens that cover what is not covered yet.

A set covers a token by its largest cosine similarity to any token of the set, at least 0. The gain of a token
is how much it adds to the coverage of all tokens; multiplied by the token's saliency it is the SCOPE score,
and the token of highest score is taken in turn. The authors' code raises the saliency to a power alpha, which
is 1 by default, counts only tokens that are not kept yet as candidates, and takes the saliency from the
attention of CLIP's class token before the decoder. Towers without a class token have none, so the saliency
here is what the prompt's last token attends to in layer K-1, as in FastV, and the features are the hidden
states that enter layer K.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.methods.cdpruner import cosine_similarity
from ep_export.methods.contract import Method, TokenView

__all__ = ["SCOPE", "cover"]


def cover(similarity: NDArray[np.float64], saliency: NDArray[np.float64], k: int) -> list[int]:
    """Greedy choice by saliency times coverage gain.

    Args:
        similarity: [N, N] cosines.
        saliency: [N], at least 0.
        k: How many, 0 to N.

    Returns:
        Numbers in the order they are taken; ties to the lower number.
    """
    if not 0 <= k <= len(similarity):
        raise ValueError(f"cannot keep {k} of {len(similarity)}")
    covered = np.zeros(len(similarity))
    chosen: list[int] = []
    for _ in range(k):
        gain = np.maximum(similarity - covered[:, None], 0).sum(axis=0) * saliency
        gain[chosen] = -np.inf
        best = int(gain.argmax())
        chosen.append(best)
        covered = np.maximum(covered, similarity[:, best])
    return chosen


def _choose(view: TokenView, k: int) -> torch.Tensor:
    visual = view.visual_index
    similarity = view.once("scope", lambda: cosine_similarity(view.hidden[visual]))
    received = view.once("scope attention", lambda: view.inside.attention[visual, 0])
    chosen = sorted(cover(similarity, received.double().cpu().numpy(), k))
    return visual[torch.tensor(chosen, dtype=torch.int64, device=visual.device)]


SCOPE = Method(
    key="scope",
    title="SCOPE",
    source="arXiv 2510.24214",
    idea="keeps tokens that the last token attends to and that cover what is not covered yet",
    choose=_choose,
)

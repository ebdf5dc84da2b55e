"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): what the words that speak of the picture look at.

Raters are the question's words that resemble the picture: the softmax over words of the dot products of
visual and word embeddings, averaged over visual tokens, is at least its own mean. A visual token's score at a
layer is the attention it receives from the raters, averaged over heads and raters. Tokens are dropped at
several layers, each by its own share.

The authors set the shares by the rank of the attention matrix and give fixed numbers for their published
budgets; these are used here, scaled to the keep: 300, 200 and 110 of 576 before layers 2, 6 and 15 of 32.
They also merge what they drop into new tokens; no token is merged here, because positions stay as they are.
"""

from __future__ import annotations

import torch

from ep_export.methods.contract import Method, Place, TokenView, keep_best
from ep_export.methods.stages import Stage, staged

__all__ = ["SPARSEVLM", "SPARSEVLM_STAGES", "raters"]

_RATED = "sparsevlm-rated"


def raters(visual: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Which words speak of the picture.

    Args:
        visual: [N, d] embeddings.
        words: [T, d] embeddings, at least one.

    Returns:
        [T] bool, at least one true.
    """
    relevance = (visual.float() @ words.float().T).softmax(dim=-1).mean(dim=0)
    # at least the mean, but for rounding: equal words all count
    return relevance >= relevance.mean() * (1 - 1e-6)


def _choose(view: TokenView, k: int) -> torch.Tensor:
    return keep_best(view, view.once("sparsevlm", lambda: _attention(view)), k)


def _attention(view: TokenView) -> torch.Tensor:
    """[N] attention that visual tokens receive from the raters."""
    visual, words = view.visual_index, view.instruction
    if not len(words):
        words = torch.tensor([view.hidden.shape[0] - 1], device=visual.device)
    chosen = words[raters(view.embeds[visual], view.embeds[words])]
    received = torch.zeros(len(visual), device=visual.device)
    for position in chosen.tolist():
        seen = view.inside.attention_from(position)
        before = visual[visual <= position]
        received[: len(before)] += seen[before]
    return received / len(chosen)


SPARSEVLM = Method(
    key=_RATED,
    title="SparseVLM, one stage",
    source="arXiv 2410.04417",
    idea="keeps what the question's words that resemble the picture attend to in layer K-1",
    choose=_choose,
)

SPARSEVLM_STAGES = Method(
    key="sparsevlm",
    title="SparseVLM",
    source="arXiv 2410.04417, without merging",
    idea="drops in three stages what the question's words that resemble the picture do not attend to",
    place=Place.STAGES,
    stages=staged(
        (
            Stage(2 / 32, 300 / 576, _RATED),
            Stage(6 / 32, 200 / 576, _RATED),
            Stage(15 / 32, 110 / 576, _RATED),
        )
    ),
)

"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): keep what the model looks at.

After layer K the visual tokens are ranked by the attention they receive in layer K-1 and the lowest R% are
dropped. The paper speaks of the attention received from all other tokens; the authors' released code, on
which their numbers rest, takes the attention of the prompt's last token alone, averaged over heads, and so
does this. Their default is K = 2.
"""

from __future__ import annotations

import torch

from ep_export.methods.contract import Method, TokenView, keep_best

__all__ = ["FASTV"]


def _choose(view: TokenView, k: int) -> torch.Tensor:
    last = view.hidden.shape[0] - 1
    received = view.once("fastv", lambda: view.inside.attention_from(last)[view.visual_index])
    return keep_best(view, received, k)


FASTV = Method(
    key="fastv",
    title="FastV",
    source="arXiv 2403.06764",
    idea="keeps what the prompt's last token attends to most in layer K-1",
    choose=_choose,
    published_layer=2,
)

"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): what the vision tower attends to, and a sample.

Dominant tokens are those that receive most attention in the tower: from CLIP's class token, in the last layer
before the features (the second last of the tower); where there is no class token, on average from all
patches, as the authors' code for Qwen2.5-VL does, here in the last block whose attention is not within
windows. A token that is several patches counts with their mean. The rest of the budget goes to contextual
tokens, an even sample of the others: of 64 tokens the authors keep 54 dominant and 10 contextual ones, of 128
and 192 as many in proportion.

They also merge every token that is left into the contextual one with the most similar keys; no token is
merged here, because positions stay as they are. Nor does the class token go into the decoder, which their
dominant tokens include. They choose before the decoder (K = 0); at another K the choice is the same and takes
effect there.
"""

from __future__ import annotations

import torch

from ep_export.methods.contract import Method, Place, TokenView

__all__ = ["VISIONZIP", "dominant_and_contextual"]

_CONTEXTUAL, _OF = 10, 64


def dominant_and_contextual(received: torch.Tensor, k: int) -> list[int]:
    """The tokens of most attention, and an even sample of the others.

    Args:
        received: [N] attention.
        k: How many, 0 to N.

    Returns:
        Their numbers, ascending; ties to the lower number.
    """
    contextual = k * _CONTEXTUAL // _OF
    order = received.argsort(descending=True, stable=True)
    dominant, others = order[: k - contextual], order[k - contextual :].sort().values
    sampled = others[:: max(1, len(others) // max(1, contextual))][:contextual]
    return sorted([*dominant.tolist(), *sampled.tolist()])


def _choose(view: TokenView, k: int) -> torch.Tensor:
    received = view.once("visionzip", view.tower_attention)
    chosen = torch.tensor(dominant_and_contextual(received, k), dtype=torch.int64)
    return view.visual_index[chosen.to(view.visual_index.device)]


VISIONZIP = Method(
    key="visionzip",
    title="VisionZip",
    source="arXiv 2412.04467, without merging",
    idea="keeps what receives most attention in the vision tower, and an even sample of the rest",
    choose=_choose,
    place=Place.ANYWHERE,
    published_layer=0,
    reads_tower=True,
)

"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): keep tokens that are far from each other.

The max-min diversity problem, solved greedily: distance is 1 - cosine of the visual embeddings that enter the
decoder. The first token is the one whose nearest neighbour is farthest; every further one is the token whose
nearest kept token is farthest. The authors prune before the decoder (K = 0). Where another K is asked for,
the choice is the same and takes effect there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.methods.contract import Method, Place, TokenView

__all__ = ["DIVPRUNE", "cosine_similarity", "most_diverse"]


def cosine_similarity(rows: torch.Tensor) -> NDArray[np.float64]:
    """[n, n] cosines of rows [n, d], in float64; a zero row is at 0 to all."""
    exact = rows.detach().to("cpu", torch.float64).numpy()
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    unit = exact / np.where(norms > 0, norms, 1)
    return np.asarray(unit @ unit.T)


def most_diverse(distance: NDArray[np.float64], k: int) -> list[int]:
    """Greedy max-min subset.

    Args:
        distance: [n, n] symmetric.
        k: How many, 0 to n.

    Returns:
        Numbers of the rows in the order they are chosen; ties to the lower number.
    """
    if not 0 <= k <= len(distance):
        raise ValueError(f"cannot keep {k} of {len(distance)}")
    if k == 0:
        return []
    if k == len(distance):
        return list(range(k))
    others = distance + np.diag(np.full(len(distance), np.inf))  # a token is not its own neighbour
    chosen = [int(others.min(axis=0).argmax())]
    nearest = distance[chosen[0]].copy()
    while len(chosen) < k:
        nearest[chosen[-1]] = -np.inf
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distance[chosen[-1]])
    return chosen


def _choose(view: TokenView, k: int) -> torch.Tensor:
    cosine = view.once("divprune", lambda: cosine_similarity(view.embeds[view.visual_index]))
    chosen = torch.tensor(sorted(most_diverse(1 - cosine, k)), dtype=torch.int64)
    return view.visual_index[chosen.to(view.visual_index.device)]


DIVPRUNE = Method(
    key="divprune",
    title="DivPrune",
    source="arXiv 2503.02175",
    idea="keeps visual embeddings that are far from each other",
    choose=_choose,
    place=Place.ANYWHERE,
    published_layer=0,
)

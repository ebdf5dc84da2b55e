"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): diverse tokens that matter to the question.

A determinantal point process over the visual tokens with the kernel diag(r) S diag(r): S is the cosine of the
visual embeddings, r their relevance to the question, scaled to 0..1 over the tokens. The subset of largest
determinant is approached greedily (fast greedy MAP, Chen et al., arXiv 1709.05135).

Relevance is the mean cosine between a visual token and the question's words. The authors take both from CLIP,
whose picture and text towers share a space (their code flips the sign there, because similarities of CLIP's
patches point the wrong way). A model without such towers has one space that both share: the embeddings that
enter the decoder. Those are used here, with the sign as the paper defines it. The authors prune before the
decoder (K = 0); at another K the choice is the same and takes effect there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.methods.contract import Method, Place, TokenView

__all__ = ["CDPRUNER", "conditional_kernel", "cosine_similarity", "greedy_map", "relevance"]

_FLOOR = 1e-6
"""What the authors add to the least relevant token, so that its row of the kernel is not zero."""

_EXHAUSTED = 1e-10
"""Below this share of the largest diagonal entry what a token adds to the determinant is rounding."""


def cosine_similarity(rows: torch.Tensor) -> NDArray[np.float64]:
    """[n, n] cosines of rows [n, d], in float64; a zero row is at 0 to all."""
    exact = rows.detach().to("cpu", torch.float64).numpy()
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    unit = exact / np.where(norms > 0, norms, 1)
    return np.asarray(unit @ unit.T)


def relevance(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much each visual token has to do with the question.

    Args:
        similarity: [N, T] cosines of visual tokens and words.

    Returns:
        [N]: mean over words, scaled so that it runs from about 0 to 1; all ones where nothing differs.
    """
    mean = similarity.mean(axis=1)
    spread = mean.max() - mean.min()
    return np.asarray((mean - mean.min() + _FLOOR) / spread) if spread > 0 else np.ones_like(mean)


def conditional_kernel(cosine: NDArray[np.float64], relevant: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, N] kernel: cosine of the tokens times both their relevances."""
    return np.asarray(relevant[:, None] * cosine * relevant[None, :])


def greedy_map(kernel: NDArray[np.float64], k: int) -> list[int]:
    """Greedy subset of large determinant.

    Each step takes the token that multiplies the determinant most; a Cholesky row a step keeps that factor up
    to date for all tokens. Where the kernel's rank is used up, the remaining places go to the largest
    diagonal entries: nothing is left to tell the tokens apart by.

    Args:
        kernel: [n, n] positive semidefinite.
        k: How many, 0 to n.

    Returns:
        Numbers of the rows in the order they are chosen; ties to the lower number.
    """
    if not 0 <= k <= len(kernel):
        raise ValueError(f"cannot keep {k} of {len(kernel)}")
    gain = np.diag(kernel).copy()
    exhausted = _EXHAUSTED * max(float(gain.max(initial=0)), np.finfo(np.float64).tiny)
    rows = np.zeros((k, len(kernel)))
    chosen: list[int] = []
    for step in range(k):
        best = int(gain.argmax())
        if gain[best] <= exhausted:
            break
        rows[step] = (kernel[best] - rows[:step, best] @ rows[:step]) / np.sqrt(gain[best])
        gain = gain - rows[step] ** 2
        chosen.append(best)
        gain[chosen] = -np.inf
    left = np.diag(kernel).copy()
    left[chosen] = -np.inf
    return [*chosen, *np.argsort(-left, kind="stable")[: k - len(chosen)].tolist()]


def _kernel(view: TokenView) -> NDArray[np.float64]:
    visual, words = view.embeds[view.visual_index], view.embeds[view.instruction]
    count = view.count
    cosine = cosine_similarity(torch.cat([visual, words]))
    relevant = relevance(cosine[:count, count:]) if len(words) else np.ones(count)
    return conditional_kernel(cosine[:count, :count], relevant)


def _choose(view: TokenView, k: int) -> torch.Tensor:
    kernel = view.once("cdpruner", lambda: _kernel(view))
    chosen = torch.tensor(sorted(greedy_map(kernel, k)), dtype=torch.int64)
    return view.visual_index[chosen.to(view.visual_index.device)]


CDPRUNER = Method(
    key="cdpruner",
    title="CDPruner",
    source="arXiv 2506.10967",
    idea="keeps embeddings that differ from each other and resemble the question",
    choose=_choose,
    place=Place.ANYWHERE,
    published_layer=0,
)

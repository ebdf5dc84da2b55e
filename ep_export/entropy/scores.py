"""Exact token scores: the oracle every faster form is measured against.

A visual token enters as its states, one row a head; a number leaves. The eigenvalues are those of the dual
Gram matrix [heads, heads], which has the non-zero spectrum of the [head_dim, head_dim] covariance and is
(head_dim / heads)^3 cheaper to decompose. Everything is float64, on whatever device the states are on.
"""

from __future__ import annotations

import math

import torch

from ep_export.policy import Scorer

__all__ = ["EIGENVALUE_FLOOR", "dual_gram", "token_scores"]

EIGENVALUE_FLOOR = 1e-10
"""The authors' released code clamps eigenvalues here before the logarithm."""

_TOKENS_AT_ONCE = 4096
"""Bounds memory: 4096 tokens of 32 heads of 128 are 134 MB in float64."""


def token_scores(states: torch.Tensor, scorer: Scorer) -> torch.Tensor:
    """Score every token exactly.

    - `paper` (arXiv 2602.17196, Eqs. 10-14): centre over heads, divide each row by its L2 norm (a zero row
      stays zero), A = R R^T / H, score = -sum(l ln l) over the eigenvalues of A, in nats.
    - `released` (the authors' code): no row normalisation, eigenvalues clamped at 1e-10, score
      = -sum(l ln l) / ln H (divided by 1 when H = 1).
    - `order2`: as `paper`, but -ln tr(A^2), the Renyi entropy of order 2; 0 for a zero A.
    - `norm`: the L2 norm of the whole token, not centred.

    Args:
        states: [tokens, heads, head_dim], any float type.
        scorer: Which score.

    Returns:
        [tokens] float64 on the same device. NaN where a token holds a non-finite value.
    """
    parts = [_chunk_scores(chunk, scorer) for chunk in torch.split(states, _TOKENS_AT_ONCE)]
    return torch.cat(parts) if parts else states.new_empty(0, dtype=torch.float64)


def dual_gram(states: torch.Tensor, *, normalise: bool) -> torch.Tensor:
    """A = R R^T / H of the centred heads.

    Centring comes before the product: centring the finished Gram instead cancels digits and swaps tokens.

    Args:
        states: [tokens, heads, head_dim] float64.
        normalise: Divide every centred row by its L2 norm first.

    Returns:
        [tokens, heads, heads] float64.
    """
    rows = states - states.mean(dim=1, keepdim=True)
    if normalise:
        norms = rows.square().sum(dim=2, keepdim=True).sqrt()
        rows = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    return torch.matmul(rows, rows.transpose(1, 2)) / states.shape[1]


def _chunk_scores(states: torch.Tensor, scorer: Scorer) -> torch.Tensor:
    exact = states.to(torch.float64)
    finite = torch.isfinite(exact).all(dim=(1, 2)) if exact.numel() else exact.new_ones(0, dtype=torch.bool)
    # eigvalsh refuses a batch with one non-finite matrix, so such tokens are scored as zeros, then marked
    exact = torch.where(finite[:, None, None], exact, torch.zeros_like(exact))
    scores = _finite_scores(exact, scorer)
    return torch.where(finite, scores, torch.full_like(scores, math.nan))


def _finite_scores(states: torch.Tensor, scorer: Scorer) -> torch.Tensor:
    if scorer is Scorer.NORM:
        return states.square().sum(dim=(1, 2)).sqrt()
    gram = dual_gram(states, normalise=scorer is not Scorer.RELEASED)
    if scorer is Scorer.ORDER2:
        purity = gram.square().sum(dim=(1, 2))
        return -torch.where(purity > 0, purity, torch.ones_like(purity)).log()
    eigenvalues: torch.Tensor = torch.linalg.eigvalsh(gram)
    if scorer is Scorer.RELEASED:
        clamped = eigenvalues.clamp_min(EIGENVALUE_FLOOR)
        heads = states.shape[1]
        return -(clamped * clamped.log()).sum(dim=1) / (math.log(heads) if heads > 1 else 1.0)
    # rounding leaves eigenvalues of about -1e-17 where zero is meant
    positive = eigenvalues.clamp_min(0)
    return -torch.xlogy(positive, positive).sum(dim=1)

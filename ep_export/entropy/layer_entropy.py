"""Entropy of one layer: how many directions the visual tokens of a picture spread over.

The states of all visual tokens at one layer enter, one number in nats leaves.
"""

from __future__ import annotations

import torch

__all__ = ["layer_entropy", "layer_spectrum"]


def layer_entropy(states: torch.Tensor, *, top: int | None = None) -> float:
    """Von Neumann entropy of the tokens' covariance (arXiv 2602.17196, section on the collapse layer).

    Args:
        states: [visual_tokens, width], heads concatenated, any float type.
        top: Count only the largest eigenvalues, so many (the paper truncates and does not state its
            number); all when None.

    Returns:
        -sum(sigma ln sigma) in nats; NaN where a state is not finite.
    """
    spectrum = layer_spectrum(states)
    if top is not None:
        spectrum = spectrum.sort(descending=True).values[:top]
    return float(-torch.xlogy(spectrum, spectrum).sum())


def layer_spectrum(states: torch.Tensor, *, dual: bool | None = None) -> torch.Tensor:
    """Eigenvalues of Sigma = X^T X / N of the centred tokens, every row divided by its L2 norm: trace 1.

    X X^T / N has the same non-zero eigenvalues, so the smaller of the two matrices is decomposed.

    Args:
        states: [visual_tokens, width].
        dual: True for X X^T, False for X^T X, None for the smaller.

    Returns:
        [min(visual_tokens, width)] float64 (or the size `dual` asks for), ascending, none negative; NaN
        where a state is not finite.
    """
    x = states.to(torch.float64)
    x = x - x.mean(dim=0, keepdim=True)
    norms = x.square().sum(dim=1, keepdim=True).sqrt()
    x = x / torch.where(norms > 0, norms, torch.ones_like(norms))
    tokens, width = x.shape
    small = x @ x.T if (tokens <= width if dual is None else dual) else x.T @ x
    small = small / tokens
    if not torch.isfinite(small).all():  # eigvalsh would raise
        return torch.full_like(small[0], torch.nan)
    eigenvalues: torch.Tensor = torch.linalg.eigvalsh(small)
    return eigenvalues.clamp_min(0)  # rounding leaves about -1e-17 where zero is meant

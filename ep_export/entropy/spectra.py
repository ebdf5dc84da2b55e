"""What the layer metrics share: rows of length 1, and the spectrum of the smaller of two Gram matrices."""

from __future__ import annotations

import torch

__all__ = ["gram_spectrum", "spectrum_entropy", "unit_rows"]


def unit_rows(states: torch.Tensor, *, centred: bool) -> torch.Tensor:
    """Every row divided by its L2 norm; a row of zeros stays.

    Args:
        states: [tokens, width], any float type.
        centred: Subtract the mean row first.

    Returns:
        [tokens, width] float64.
    """
    rows = states.to(torch.float64)
    if centred:
        rows = rows - rows.mean(dim=0, keepdim=True)
    norms = rows.square().sum(dim=1, keepdim=True).sqrt()
    return rows / torch.where(norms > 0, norms, torch.ones_like(norms))


def gram_spectrum(rows: torch.Tensor, *, dual: bool | None = None) -> torch.Tensor:
    """Eigenvalues of X X^T / N, which has the same non-zero ones as X^T X / N: the smaller is decomposed.

    Args:
        rows: X, [N, width] float64.
        dual: True for X X^T, False for X^T X, None for the smaller.

    Returns:
        [min(N, width)] (or the size `dual` asks for), ascending, none negative; NaN where a row is not
        finite.
    """
    tokens, width = rows.shape
    small = rows @ rows.T if (tokens <= width if dual is None else dual) else rows.T @ rows
    small = small / tokens
    if not torch.isfinite(small).all():  # eigvalsh would raise
        return torch.full_like(small[0], torch.nan)
    eigenvalues: torch.Tensor = torch.linalg.eigvalsh(small)
    return eigenvalues.clamp_min(0)  # rounding leaves about -1e-17 where zero is meant


def spectrum_entropy(spectrum: torch.Tensor) -> float:
    """-sum(s ln s) in nats, 0 ln 0 being 0."""
    return float(-torch.xlogy(spectrum, spectrum).sum())

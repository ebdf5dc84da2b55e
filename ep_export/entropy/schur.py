"""Schur complement entropy: what the visual tokens say that the text does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ep_export.entropy.spectra import gram_spectrum, spectrum_entropy, unit_rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["schur_entropy"]

_RANK = 1e-10
"""Singular values below this share of the largest are directions that rounding made."""


def schur_entropy(visual: Tensor, text: Tensor) -> float:
    """Entropy of the spectrum of (K_II - K_IT K_TT^-1 K_TI) / N, K the cosine similarities.

    After arXiv 2412.18645, whose pictures and texts come in pairs and share a covariance. The tokens of one
    prompt do not, so the blocks are those of their Gram matrix. Its Schur complement is the Gram matrix of
    the visual tokens without their part in the span of the text, and is computed as such: K_TT may be
    singular, as words repeat.

    Args:
        visual: [N, width] states of the visual tokens, any float type.
        text: [T, width] states of the text tokens at the same layer.

    Returns:
        -sum(s ln s) in nats: 0 where the text says all, the logarithm of `vendi_score` where it says nothing
        of it (or T is 0); NaN where a state is not finite.
    """
    rows, words = unit_rows(visual, centred=False), unit_rows(text, centred=False)
    if not (torch.isfinite(rows).all() and torch.isfinite(words).all()):
        return float("nan")
    if len(words):
        _, sizes, directions = torch.linalg.svd(words, full_matrices=False)
        span = directions[sizes > _RANK * sizes[0]]
        rows = rows - (rows @ span.T) @ span
    return spectrum_entropy(gram_spectrum(rows))

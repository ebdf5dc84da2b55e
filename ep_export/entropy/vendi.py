"""Vendi score: how many different tokens the visual tokens of a layer are worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ep_export.entropy.spectra import gram_spectrum, spectrum_entropy, unit_rows

if TYPE_CHECKING:
    import torch

__all__ = ["vendi_score"]


def vendi_score(states: torch.Tensor) -> float:
    """Exponential of the von Neumann entropy of K / N, K the cosine similarities (arXiv 2210.02410).

    Args:
        states: [visual_tokens, width], any float type; not centred, as cosines are not.

    Returns:
        1 when all point the same way, N when all are orthogonal; NaN where a state is not finite.
    """
    return math.exp(spectrum_entropy(gram_spectrum(unit_rows(states, centred=False))))

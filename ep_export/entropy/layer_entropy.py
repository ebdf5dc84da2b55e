"""Entropy of one layer: how many directions the visual tokens of a picture spread over.

The states of all visual tokens at one layer enter, one number in nats leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ep_export.entropy.spectra import gram_spectrum, spectrum_entropy, unit_rows

if TYPE_CHECKING:
    import torch

__all__ = ["layer_entropy", "layer_spectrum"]


def layer_entropy(states: torch.Tensor) -> float:
    """Von Neumann entropy of the tokens' covariance (arXiv 2602.17196, section on the collapse layer).

    All eigenvalues count; `truncated_entropy` counts the largest only.

    Args:
        states: [visual_tokens, width], heads concatenated, any float type.

    Returns:
        -sum(sigma ln sigma) in nats; NaN where a state is not finite.
    """
    return spectrum_entropy(layer_spectrum(states))


def layer_spectrum(states: torch.Tensor, *, dual: bool | None = None) -> torch.Tensor:
    """Eigenvalues of Sigma = X^T X / N of the centred tokens, every row divided by its L2 norm: trace 1.

    Args:
        states: [visual_tokens, width].
        dual: See `gram_spectrum`.

    Returns:
        [min(visual_tokens, width)] float64 (or the size `dual` asks for), ascending, none negative; NaN
        where a state is not finite.
    """
    return gram_spectrum(unit_rows(states, centred=True), dual=dual)

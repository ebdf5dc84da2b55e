"""Matrix Nuclear-Norm: spread of the visual tokens without a decomposition, for very long sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ep_export.entropy.spectra import unit_rows

if TYPE_CHECKING:
    import torch

__all__ = ["matrix_nuclear_norm"]


def matrix_nuclear_norm(states: torch.Tensor) -> float:
    """The L1,2 norm in place of the nuclear norm, divided by the tokens (arXiv 2410.10672, Eq. 11).

    Rows are centred and divided by their L2 norm; the largest min(N, width) column norms are added up.
    O(N width).

    Args:
        states: [visual_tokens, width], any float type.

    Returns:
        Between 0 and sqrt(min(N, width) / N), larger when tokens spread over more directions; NaN where a
        state is not finite.
    """
    rows = unit_rows(states, centred=True)
    columns = rows.square().sum(dim=0).sqrt()
    return float(columns.sort(descending=True).values[: min(rows.shape)].sum() / len(rows))

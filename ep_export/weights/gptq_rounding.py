"""Calibrated rounding: GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323).

Inputs are rounded one after the other; what each leaves wrong is spread over those not rounded yet, by the
second moments of what really enters the layer. Written as LDLQ (Chee et al., NeurIPS 2023, arXiv 2307.13304,
whose theorem 6 says that it is the same algorithm): H = (U + I) D (U + I)', U strictly upper, and input k is
rounded after adding sum_{j<k} U[j, k] (w_j - rounded w_j). One factorisation, no inverse: half the work and
half the memory. Symmetric codes, one scale a block of inputs, chosen when the block is reached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ep_export.numerics import WeightKind, Weights
from ep_export.weights.packed import PackedLinear
from ep_export.weights.rounding import block_scales, check_finite, check_group

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Moments", "round_calibrated"]

_DAMPING = 0.01
"""Share of the mean second moment added to all, as in the paper: factors of few samples stay finite."""

_PANEL = 512  # columns that are factored together: wide enough for matrix products, narrow enough to copy
_BATCH = 128  # inputs whose errors are spread together
_LARGEST = {WeightKind.INT4: 7, WeightKind.INT8: 127}


class Moments:
    """Second moments of what enters a layer: [in, in], gathered batch by batch, then factored once.

    Attributes:
        inputs: Of the layer.
        rows: Seen so far.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.rows = 0
        self._total: torch.Tensor | None = torch.zeros(inputs, inputs)
        self._factor: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, activations: torch.Tensor) -> None:
        """Add rows [.., in].

        Raises:
            ValueError: The moments were factored already, and let go of.
        """
        if self._total is None:
            raise ValueError("rows after the moments were factored")
        rows = activations.detach().reshape(-1, self.inputs).float().cpu()
        self._total.addmm_(rows.T, rows)
        self.rows += len(rows)

    def factor(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How errors spread, and what never entered.

        Returns:
            [in, in] float32, its strict upper triangle the U of the module's text; and [in] bool, inputs that
            were always 0. At its height this takes three float32 matrices of [in, in].
        """
        if self._factor is None:
            assert self._total is not None  # noqa: S101 - let go of below
            unseen = self._total.diagonal() == 0
            # H = R R' with R upper is the lower factor of H read from its last row and column
            matrix = torch.empty(self.inputs, self.inputs, dtype=torch.float64)
            for start in range(0, self.inputs, _PANEL):
                stop = min(start + _PANEL, self.inputs)
                matrix[start:stop] = self._total[self.inputs - stop : self.inputs - start].flip(0, 1)
            self._total = None
            matrix.div_(self.rows)
            matrix.diagonal()[unseen.flip(0)] = 1
            matrix.diagonal().add_(_DAMPING * matrix.diagonal().mean())
            _factor_in_place(matrix)
            matrix.div_(matrix.diagonal().clone())  # each column by its pivot: U + I, flipped
            matrix = matrix.float()
            self._factor = matrix.flip(0, 1), unseen
        return self._factor


def _factor_in_place(matrix: torch.Tensor) -> None:
    """Cholesky panel by panel: the lower triangle becomes the factor, what lies above it is of no use.

    LAPACK's through torch copies the matrix, `out` or not: twice the memory of what is largest here.
    """
    size = len(matrix)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        pivot, below = matrix[start:stop, start:stop], matrix[stop:, start:stop]
        pivot.copy_(torch.linalg.cholesky(pivot))
        below.copy_(torch.linalg.solve_triangular(pivot.T, below, upper=True, left=False))
        for column in range(stop, size, _PANEL):
            end = min(column + _PANEL, size)
            rows = matrix[column:, start:stop]
            matrix[column:, column:end].addmm_(rows, rows[: end - column].T, alpha=-1)


def round_calibrated(
    weight: NDArray[np.float32],
    moments: Moments,
    weights: Weights,
    *,
    scale_type: str = "float16",
    name: str = "weight",
) -> PackedLinear:
    """Round one linear layer so that its outputs, not its weights, stay near.

    Args:
        weight: [in, out], finite.
        moments: Of its inputs, at least one row.
        weights: int4 or int8, and the group.
        scale_type: See `round_nearest`.
        name: For messages.

    Raises:
        UserError: The group does not divide the inputs, or a weight is not finite.
        ValueError: fp8, or no rows were seen.
    """
    inputs, outputs = weight.shape
    check_group(inputs, weights, name)
    check_finite(weight, name)
    if weights.kind not in _LARGEST or not moments.rows:
        raise ValueError(f"{name}: {weights.kind.value} with {moments.rows} rows cannot be calibrated")
    group, largest = weights.group or inputs, _LARGEST[weights.kind]
    spread, unseen = moments.factor()
    wanted = torch.from_numpy(weight.copy())
    wanted[unseen] = 0
    errors = torch.empty(inputs, outputs)
    codes = torch.empty(inputs, outputs, dtype=torch.int8)
    scales = torch.empty(inputs // group, outputs)
    batch = min(group, _BATCH)
    for start in range(0, inputs, batch):
        stop = min(start + batch, inputs)
        if start % group == 0:
            block = _corrected(wanted, errors, spread, start, start + group)
            scales[start // group] = torch.from_numpy(
                block_scales(block[None].numpy(), weights.kind, scale_type)[0]
            )
        scale = scales[start // group]
        left = _corrected(wanted, errors, spread, start, stop)
        for i in range(start, stop):
            value = left[i - start] + spread[start:i, i] @ errors[start:i]
            code = (value / scale).round_().clamp_(-largest - 1, largest)
            codes[i] = code.to(torch.int8)
            errors[i] = wanted[i] - code * scale
    return PackedLinear(weights.kind, codes.numpy(), scales.numpy())


def _corrected(
    wanted: torch.Tensor, errors: torch.Tensor, spread: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """[stop - start, out]: inputs with what all before `start` left wrong."""
    return torch.addmm(wanted[start:stop], spread[:start, start:stop].T, errors[:start])

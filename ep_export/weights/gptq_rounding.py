"""Calibrated rounding: GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323).

Inputs are rounded one after the other; what each leaves wrong is spread over those not rounded yet, by the
second moments of what really enters the layer. Own text after the paper's algorithm 1, with its lazy batches
of 128 inputs; symmetric codes, one scale a block of inputs, found when the block is reached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ep_export.numerics import WeightKind, Weights
from ep_export.weights.packed import PackedLinear
from ep_export.weights.rounding import block_scales, check_weight

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Moments", "round_calibrated"]

_DAMPING = 0.01
"""Share of the mean second moment added to all, as in the paper: inverses of few samples stay finite."""

_BATCH = 128
_LARGEST = {WeightKind.INT4: 7, WeightKind.INT8: 127}


class Moments:
    """Second moments of what enters a layer: [in, in], gathered batch by batch."""

    def __init__(self, inputs: int) -> None:
        self.total = torch.zeros(inputs, inputs)
        self.rows = 0
        self._spread: torch.Tensor | None = None

    def add(self, activations: torch.Tensor) -> None:
        """Add rows [.., in]."""
        rows = activations.detach().reshape(-1, self.total.shape[0]).float().cpu()
        self.total.addmm_(rows.T, rows)
        self.rows += len(rows)
        self._spread = None

    @property
    def unseen(self) -> torch.Tensor:
        """[in] bool: inputs that were always 0."""
        return self.total.diagonal() == 0

    @property
    def spread(self) -> torch.Tensor:
        """[in, in] upper Cholesky factor of the inverse of the damped moments."""
        if self._spread is None:
            matrix = (self.total / self.rows).double()
            matrix.diagonal()[self.unseen] = 1
            matrix.diagonal().add_(_DAMPING * matrix.diagonal().mean())
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
            self._spread = torch.linalg.cholesky(inverse, upper=True).float()
        return self._spread


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
    check_weight(weight, weights, name)
    if weights.kind not in _LARGEST or not moments.rows:
        raise ValueError(f"{name}: {weights.kind.value} with {moments.rows} rows cannot be calibrated")
    inputs, outputs = weight.shape
    group, largest = weights.group or inputs, _LARGEST[weights.kind]
    left = torch.from_numpy(weight.copy())  # [in, out]; rows become what is left to round
    left[moments.unseen] = 0
    spread = moments.spread
    codes = torch.empty(inputs, outputs, dtype=torch.int8)
    scales = torch.empty(inputs // group, outputs)
    for start in range(0, inputs, _BATCH):
        stop = min(start + _BATCH, inputs)
        errors = torch.empty(stop - start, outputs)
        for i in range(start, stop):
            if i % group == 0:
                # blocks longer than a batch have rows whose share of earlier batches is not added yet
                block = left[i : i + group].clone()
                if i + group > stop:
                    block[stop - i :] -= spread[start:i, stop : i + group].T @ errors[: i - start]
                scale = block_scales(block[None].numpy(), weights.kind, scale_type)
                scales[i // group] = torch.from_numpy(scale)[0]
            scale_row = scales[i // group]
            code = (left[i] / scale_row).round().clamp(-largest - 1, largest)
            codes[i] = code.to(torch.int8)
            error = (left[i] - code * scale_row) / spread[i, i]
            left[i:stop] -= spread[i, i:stop, None] * error
            errors[i - start] = error
        left[stop:] -= spread[start:stop, stop:].T @ errors
    return PackedLinear(weights.kind, codes.numpy(), scales.numpy())

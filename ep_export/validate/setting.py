"""What every stage of a validation needs: the bundle's facts, and arrays out of the oracle's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.bundle import Manifest, Precision
from ep_export.reference import PrefillStates
from ep_export.validate.node_check import NodeRunner
from ep_export.validate.observe import Observation
from ep_export.validate.tolerance import Tolerance, float32_tolerance, half_tolerance

__all__ = ["Setting", "half_noise", "to_numpy"]


@dataclass(frozen=True)
class Setting:
    """What every stage needs to know.

    Attributes:
        manifest: The bundle's.
        node: The bundle's EntropyPrune node.
        vision_layers: Depth of the vision encoder.
    """

    manifest: Manifest
    node: NodeRunner
    vision_layers: int

    def tolerance(self, layers: int, noise: float) -> Tolerance:
        """For a value that went through so many layers and that the half type changes by `noise`."""
        float32 = float32_tolerance(self.manifest.dims, layers)
        if self.manifest.precision is Precision.FP32:
            return float32
        return half_tolerance(float32, noise, self.manifest.precision)


def half_noise(case: Observation, of: Callable[[PrefillStates], torch.Tensor]) -> float:
    """Largest difference between the oracle in the graphs' half type and in float32; 0 for float32 graphs."""
    if case.half is None:
        return 0.0
    return float((of(case.half).double() - of(case.given).double()).abs().max())


def to_numpy(tensor: torch.Tensor | None) -> NDArray[np.float32]:
    """float32 on the host."""
    if tensor is None:
        raise ValueError("the oracle scored nothing here")  # callers ask only about prompts with pictures
    array: NDArray[np.float32] = tensor.float().numpy()
    return array

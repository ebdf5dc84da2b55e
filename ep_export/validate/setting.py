"""What every stage of a validation needs: the bundle's facts, and how far the half type moves the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.bundle import Manifest, Precision
from ep_export.policy import Schedule
from ep_export.reference import PrefillStates
from ep_export.validate.observe import Observation
from ep_export.validate.tolerance import Tolerance, tolerance_of

__all__ = [
    "HALF_TYPES",
    "Setting",
    "half_noise",
    "to_numpy",
    "vision_layers",
]

HALF_TYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
"""Types of graphs in which the oracle is run as well."""

_DEPTHS = ("depth", "num_hidden_layers")
"""What vision configs call their number of layers."""


@dataclass(frozen=True)
class Setting:
    """What every stage needs to know.

    Attributes:
        manifest: The bundle's.
        schedule: Cuts and choosers that are validated.
        vision_layers: Depth of the vision encoder.
    """

    manifest: Manifest
    schedule: Schedule
    vision_layers: int

    def tolerance(self, layers: int, noise: float) -> Tolerance:
        """For a value behind the vision encoder and so many decoder layers, moved by `noise` in half type."""
        return tolerance_of(self.manifest, self.vision_layers + layers, noise)

    def numbered(self, stage: str, cut: int) -> str:
        """Name of a stage at a cut: with its number where there are several."""
        return f"{stage}_{cut}" if len(self.schedule.cuts) > 1 else stage


def vision_layers(config: Any) -> int:
    """Depth of a config's vision encoder."""
    vision = config.vision_config
    return int(next(getattr(vision, name) for name in _DEPTHS if hasattr(vision, name)))


def half_noise(case: Observation, of: Callable[[PrefillStates], torch.Tensor]) -> float:
    """Largest difference between the oracle in the graphs' half type and in float32; 0 for float32 graphs."""
    if case.half is None:
        return 0.0
    apart = (of(case.half).double() - of(case.given).double()).abs()
    return float(apart.max()) if apart.numel() else 0.0


def to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    """float32 on the host."""
    array: NDArray[np.float32] = tensor.float().numpy()
    return array

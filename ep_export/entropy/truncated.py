"""UNComp's truncated matrix entropy: only the eigenvalues before the elbow count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ep_export.entropy.spectra import spectrum_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["spectrum_elbow", "truncated_entropy"]


def truncated_entropy(spectrum: torch.Tensor) -> float:
    """-sum(sigma ln sigma) over the eigenvalues up to the elbow (arXiv 2410.03090, section 3).

    What lies behind the elbow is noise of many small directions, whose sum hides a drop of the few large
    ones.

    Args:
        spectrum: Of a layer, see `layer_spectrum`; any order.

    Returns:
        Nats; NaN where the spectrum is not finite.
    """
    largest = spectrum.sort(descending=True).values
    return spectrum_entropy(largest[: spectrum_elbow(largest.tolist())])


def spectrum_elbow(descending: Sequence[float]) -> int:
    """How many eigenvalues stand before the elbow.

    The paper truncates "at the elbow point" and gives no formula. Here it is the point farthest below the
    chord from the first to the last eigenvalue, itself left out: the usual reading of an elbow.

    Args:
        descending: At least one.

    Returns:
        1 to their number; all when the spectrum lies nowhere below its chord.
    """
    values = torch.tensor(descending, dtype=torch.float64)
    chord = torch.lerp(values[0], values[-1], torch.linspace(0, 1, len(values), dtype=torch.float64))
    below = chord - values
    return int(below.argmax()) if bool(below.max() > 1e-12) else len(values)

"""Means over pictures: how far they are to be trusted, and how a record writes them. NumPy only."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["floats", "resampled_means"]


def resampled_means(values: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """[resamples, columns] means over pictures drawn with replacement, the same draws for all columns.

    Args:
        values: [images, columns].
        seed: Of the draws.
        resamples: How many.
    """
    return np.asarray(_weights(len(values), seed, resamples) @ values)


def floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Plain numbers with as many digits as a measured one is good for."""
    return tuple(float(f"{value:.6g}") for value in values)


@functools.lru_cache(maxsize=4)
def _weights(images: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """[resamples, images] how much each picture counts in each resample."""
    even = np.full(images, 1 / images)
    return np.random.default_rng(seed).multinomial(images, even, size=resamples) / images

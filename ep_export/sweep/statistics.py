"""Means with 95% intervals, and paired differences. NumPy only.

What is drawn anew is the picture: questions about one picture are not independent. A method of chance has
several draws, which are drawn anew with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MeanInterval", "Sampling", "wilson"]

RESAMPLES = 2_000
"""The ends of a 95% interval then move by about 3% of its width from one seed to the next."""

_Z = 1.959964
"""Two-sided 95% of the normal distribution."""


@dataclass(frozen=True)
class MeanInterval:
    """A mean over questions with its 95% interval.

    Attributes:
        value: The mean.
        low: Lower end of the interval.
        high: Upper end.
        interval: What it rests on: "wilson" or "bootstrap".
    """

    value: float
    low: float
    high: float
    interval: str

    @property
    def side(self) -> int:
        """1 when it is above 0 for sure, -1 when it is below, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def wilson(right: int, trials: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share.

    Args:
        right: Successes.
        trials: Trials, above 0.

    Returns:
        (low, high), within 0..1.
    """
    share, square = right / trials, _Z * _Z
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = (
        _Z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    )
    # at the ends the two terms are equal but for rounding
    return middle - half if right else 0.0, middle + half if right < trials else 1.0


class Sampling:
    """The questions of a sweep, grouped by picture; every interval is drawn from here.

    Args:
        pictures: Of every question, the picture's number.
        seed: Of the resampling: the same for all rows, so that differences are paired.
    """

    def __init__(self, pictures: NDArray[np.int64], *, seed: int = 0) -> None:
        _, group = np.unique(pictures, return_inverse=True)
        self._one_each = len(group) == group.max() + 1
        count = int(group.max()) + 1
        generator = np.random.default_rng(seed)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        weights = drawn[:, group].astype(np.float64)
        self._weights = weights / weights.sum(axis=1, keepdims=True)
        self._seed = seed

    def share(self, right: NDArray[np.bool_]) -> MeanInterval:
        """Accuracy of one run.

        Wilson's interval where every question has a picture of its own, else over pictures.

        Args:
            right: [questions].
        """
        if not self._one_each:
            return self.mean(right[:, None].astype(np.float64))
        low, high = wilson(int(right.sum()), len(right))
        return MeanInterval(float(right.mean()), low, high, "wilson")

    def mean(self, values: NDArray[np.float64]) -> MeanInterval:
        """Mean over questions and draws, bootstrapped over pictures and draws.

        Args:
            values: [questions, draws].
        """
        draws = values.shape[1]
        means = self._weights @ values  # [resamples, draws]
        if draws > 1:
            generator = np.random.default_rng(self._seed + 1)
            picks = generator.integers(draws, size=(RESAMPLES, draws))
            means = np.take_along_axis(means, picks, axis=1)
        low, high = np.quantile(means.mean(axis=1), [0.025, 0.975])
        return MeanInterval(float(values.mean()), float(low), float(high), "bootstrap")

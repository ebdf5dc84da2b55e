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


def wilson(right: float, trials: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share.

    Args:
        right: Successes; a mean of several draws need not be whole.
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
    return max(0.0, middle - half) if right else 0.0, min(1.0, middle + half) if right < trials else 1.0


class Sampling:
    """The questions of a sweep, grouped by picture; every interval is drawn from here.

    Args:
        pictures: Of every question, the picture's number.
        seed: Of the resampling: the same for all rows, so that differences are paired.
    """

    def __init__(self, pictures: NDArray[np.int64], *, seed: int = 0) -> None:
        _, self._group = np.unique(pictures, return_inverse=True)
        self.questions = len(self._group)
        self.pictures = int(self._group.max()) + 1
        # two pictures more than there are, which `difference` gives outcomes to
        count = self.pictures + 2
        generator = np.random.default_rng(seed)
        self._drawn = generator.multinomial(
            self.pictures, np.full(self.pictures, 1 / self.pictures), RESAMPLES
        )
        self._drawn_more = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
        self._seed = seed

    def share(self, values: NDArray[np.float64]) -> MeanInterval:
        """Mean of numbers from 0 to 1, such as right and wrong: Wilson's interval, which is never empty.

        Questions about one picture, and draws, are not independent: trials are as many as would vary as much
        as the mean does over resampled pictures and draws, at most one a question; as many as pictures where
        nothing varies.

        Args:
            values: [questions, draws], 0 to 1.
        """
        value = float(values.mean())
        trials = float(self.questions)
        if self.pictures < self.questions or values.shape[1] > 1:
            spread = float(self._means(values, self._drawn).var())
            trials = min(trials, value * (1 - value) / spread) if spread > 0 else float(self.pictures)
        low, high = wilson(value * trials, max(trials, 1.0))
        return MeanInterval(value, low, high, "wilson")

    def mean(self, values: NDArray[np.float64]) -> MeanInterval:
        """Mean over questions and draws, bootstrapped over pictures and draws.

        Args:
            values: [questions, draws].
        """
        return self._interval(values, self._means(values, self._drawn))

    def difference(self, values: NDArray[np.float64]) -> MeanInterval:
        """Mean of paired differences between -1 and 1, bootstrapped as in `mean`; never without width.

        Where few outcomes differ, those that were not seen count too: two pictures are added of which one
        speaks for either side (after Agresti and Min 2005, Statistics in Medicine 24).

        Args:
            values: [questions, draws], -1 to 1.
        """
        each = np.full((1, values.shape[1]), self.questions / self.pictures)
        return self._interval(values, self._means(values, self._drawn_more, extra=(each, -each)))

    def _means(
        self,
        values: NDArray[np.float64],
        drawn: NDArray[np.int64],
        extra: tuple[NDArray[np.float64], ...] = (),
    ) -> NDArray[np.float64]:
        """[resamples] means over resampled pictures and draws."""
        draws = values.shape[1]
        sums = np.zeros((self.pictures, draws))
        np.add.at(sums, self._group, values)
        counts = np.bincount(self._group, minlength=self.pictures).astype(np.float64)
        counts = np.concatenate([counts, np.full(len(extra), self.questions / self.pictures)])
        means = drawn @ np.concatenate([sums, *extra]) / (drawn @ counts)[:, None]  # [resamples, draws]
        if draws > 1:
            generator = np.random.default_rng(self._seed + 1)
            picks = generator.integers(draws, size=(RESAMPLES, draws))
            means = np.take_along_axis(means, picks, axis=1)
        return np.asarray(means.mean(axis=1))

    def _interval(self, values: NDArray[np.float64], means: NDArray[np.float64]) -> MeanInterval:
        value = float(values.mean())
        low, high = (float(end) for end in np.quantile(means, [0.025, 0.975]))
        return MeanInterval(value, min(low, value), max(high, value), "bootstrap")

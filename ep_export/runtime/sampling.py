"""The next token from logits: greedy, or sampled reproducibly. NumPy only.

The order is Hugging Face's: repetition penalty (also when greedy), temperature, top-k, top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UsageError

__all__ = ["Sampling", "TokenChooser", "penalised", "probabilities"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits; above 0.
        top_p: Draw from the most likely tokens that together reach this probability; 1 is all.
        top_k: Draw from this many most likely tokens; 0 is all.
        seed: Of the random numbers: the same seed gives the same answer on the same machine.

    Raises:
        UsageError: A value is no finite number (NumPy's are numbers, true and false are none), or out of
            range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_finite(self.temperature) and self.temperature > 0):
            raise UsageError(f"temperature is {self.temperature}, expected a finite number above 0")
        if not (_finite(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(f"top-p is {self.top_p}, expected a number above 0 and at most 1")
        if not (_whole(self.top_k) and self.top_k >= 0):
            raise UsageError(f"top-k is {self.top_k}, expected a whole number, 0 (all) or more")
        if not (_whole(self.seed) and self.seed >= 0):
            raise UsageError(f"seed is {self.seed}, expected a whole number, 0 or more")


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class TokenChooser:
    """Chooses token after token of one answer.

    Args:
        prompt_ids: Ids of the prompt, which the repetition penalty counts too.
        repetition_penalty: Above 1 makes repeated tokens less likely; 1 is none.
        sampling: How to draw; greedy when None.
    """

    def __init__(
        self, prompt_ids: Sequence[int], *, repetition_penalty: float, sampling: Sampling | None
    ) -> None:
        self._seen = set(prompt_ids)
        self._penalty = repetition_penalty
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed if sampling else 0)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token's id.

        Args:
            logits: [vocab_size] float32.
        """
        scores = penalised(logits, sorted(self._seen), self._penalty)
        if self._sampling is None:
            token = int(scores.argmax())
        else:
            chances = probabilities(scores, self._sampling)
            token = int(self._random.choice(chances.shape[0], p=chances))
        self._seen.add(token)
        return token


def penalised(logits: NDArray[np.float32], seen: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """Make the tokens in `seen` less likely: positive logits divided by the penalty, negative multiplied."""
    if penalty == 1.0:
        return logits
    scores = logits.copy()
    known = np.fromiter((i for i in seen if i < scores.shape[0]), dtype=np.int64)
    before = scores[known]
    factor = np.float32(penalty)
    scores[known] = np.where(before < 0, before * factor, before / factor)
    return scores


def probabilities(scores: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Chances of every token under temperature, top-k and top-p, [vocab_size] float64 that sum to 1."""
    scaled = scores.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[0]:
        threshold = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        scaled = np.where(scaled < threshold, -np.inf, scaled)
    chances: NDArray[np.float64] = np.exp(scaled - scaled.max())
    chances /= chances.sum()
    if sampling.top_p < 1:
        # The smallest set of most likely tokens that reaches top_p; the last one in is kept whole.
        order = np.argsort(-chances, kind="stable")
        before = np.cumsum(chances[order]) - chances[order]
        chances[order[before >= sampling.top_p]] = 0
        chances /= chances.sum()
    return chances

"""Generation: decode token by token after prefill, through the spans alone.

The caches of a span hold what reached it: all of the prompt before the first cut, what was kept after it. New
tokens go into all of them and continue at the prompt's own positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from ep_export.planning import Pair
from ep_export.policy import Keep
from ep_export.runtime.batch import open_decoder
from ep_export.runtime.components import Components, cache_names
from ep_export.runtime.kept import KeptPicture
from ep_export.runtime.prefill import Prefill, Timer
from ep_export.runtime.sampling import TokenChooser

__all__ = ["AnswerCut", "Continuation", "Decoding", "Finish", "Generation", "run_decode"]


_ROOM = 256
"""Rows that caches of fixed capacity grow by."""


class Finish(str, Enum):
    """Why an answer ended."""

    END = "end"  # the model ended it
    LENGTH = "length"  # max_new_tokens
    CONTEXT = "context"  # the model's context is full
    STOP = "stop"  # a text that the request named; of a served answer
    CANCELLED = "cancelled"  # nobody wanted the rest; of a served answer


@dataclass(frozen=True)
class AnswerCut:
    """What a cut let through.

    Attributes:
        layer: K: what is kept enters this layer.
        policy: Name of the chooser.
        kept_index: [M] prompt positions that go on.
    """

    layer: int
    policy: str
    kept_index: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """An answer and what it took.

    Attributes:
        answer: The text, special tokens dropped.
        token_ids: Generated ids, the one that ended the answer included.
        prompt_tokens: S.
        visual_tokens: N.
        kept_index: [M] prompt positions that reach the last span.
        timings_ms: prepare, vision, embed, prefill (spans), prune, first_token (all of these), decode (all
            steps), decode_per_token, total.
        keep: The amount kept that was asked for.
        finish: Why it ended.
        pictures: What was kept of each picture.
        cuts: Every cut the prompt went through; none without a picture.
        policies: Names of the choosers in use, cut by cut.
        first_token_flops: Of vision encoder and prefill: of this prompt unpruned, and as it was answered.
    """

    answer: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    visual_tokens: int
    kept_index: tuple[int, ...]
    timings_ms: dict[str, float]
    keep: Keep
    finish: Finish
    pictures: tuple[KeptPicture, ...]
    cuts: tuple[AnswerCut, ...]
    policies: tuple[str, ...]
    first_token_flops: Pair


@dataclass(frozen=True)
class Decoding:
    """What the decode loop needs besides the prefill.

    Attributes:
        limit: Most tokens to generate, at least 1.
        eos_token_ids: Ids that end the answer.
        chooser: Chooses tokens.
        on_token: Called with every id as soon as it is known.
    """

    limit: int
    eos_token_ids: tuple[int, ...]
    chooser: TokenChooser
    on_token: Callable[[int], None] | None = None


class Continuation:
    """An answer under way: takes a token, gives the logits of the next.

    Args:
        components: The opened bundle.
        prefill: Of the prompt.
        room: Tokens that caches of fixed capacity are made for; they grow beyond when they must.

    Attributes:
        logits: [vocab_size] float32, of the next token.
    """

    def __init__(self, components: Components, prefill: Prefill, room: int = _ROOM) -> None:
        self.logits: NDArray[np.float32] = prefill.logits
        names = (next(iter(cache_names(span.layer_range))) for span in components.manifest.spans)
        capacity = [prefill.caches[name].shape[2] + room for name in names]
        self._decoder = open_decoder(components, slots=1, capacity=capacity)
        self._decoder.admit(0, prefill)

    def feed(self, token: int) -> None:
        """Append a token, whichever chose it."""
        if self._decoder.room(0) == 0:
            self._decoder.grow(_ROOM)
        self.logits = self._decoder.step({0: token})[0]


def run_decode(answer: Continuation, decoding: Decoding, timer: Timer) -> tuple[int, ...]:
    """Generate until an end token or the limit.

    Args:
        answer: After the prefill.
        decoding: How to choose tokens and when to stop.
        timer: Gets decode, all steps together.

    Returns:
        The generated ids, the end token included.
    """
    tokens: list[int] = []
    while True:
        token = decoding.chooser.choose(answer.logits)
        tokens.append(token)
        if decoding.on_token:
            decoding.on_token(token)
        if token in decoding.eos_token_ids or len(tokens) == decoding.limit:
            return tuple(tokens)
        with timer.stage("decode"):
            answer.feed(token)

"""Generation: decode token by token after prefill, with two KV lengths.

Layers 0..K-1 hold the whole prompt in their caches, layers K..L-1 what was kept. New tokens go into all of
them and continue at the prompt's own positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from ep_export.policy import Keep
from ep_export.runtime.base import Feed
from ep_export.runtime.prefill import Components, Prefill, Timer, past_feeds, step
from ep_export.runtime.sampling import TokenChooser

__all__ = ["Decoding", "Finish", "Generation", "KeptPicture", "run_decode"]


class Finish(str, Enum):
    """Why an answer ended."""

    END = "end"  # the model ended it
    LENGTH = "length"  # max_new_tokens
    CONTEXT = "context"  # the model's context is full


@dataclass(frozen=True)
class KeptPicture:
    """What was kept of one picture.

    Attributes:
        token_grid: (height, width) in cells, one a visual token.
        kept_tokens: Row-major indices of the cells whose tokens reach layer K.
        view: What the grid lies on; see `ep_export.families.base.Picture`.
        video: Which video of the prompt this is a part of, counted from 0; None for a picture.
    """

    token_grid: tuple[int, int]
    kept_tokens: tuple[int, ...]
    view: tuple[int, int, int, int] | None = None
    video: int | None = None

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[height * width], true where a cell's token was kept."""
        mask = np.zeros(self.token_grid[0] * self.token_grid[1], dtype=np.bool_)
        mask[list(self.kept_tokens)] = True
        return mask


@dataclass(frozen=True)
class Generation:
    """An answer and what it took.

    Attributes:
        answer: The text, special tokens dropped.
        token_ids: Generated ids, the one that ended the answer included.
        prompt_tokens: S.
        visual_tokens: N.
        kept_index: [M] prompt positions that reach layer K.
        timings_ms: prepare, vision, embed, head_prefill, tail_prefill, decode (all steps), decode_per_token,
            total.
        keep: The amount kept that was asked for.
        finish: Why it ended.
        pictures: What was kept of each picture.
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


@dataclass(frozen=True)
class Decoding:
    """What the decode loop needs besides the prefill.

    Attributes:
        next_position: Position id of the first generated token.
        limit: Most tokens to generate, at least 1.
        eos_token_ids: Ids that end the answer.
        chooser: Chooses tokens.
        on_token: Called with every id as soon as it is known.
    """

    next_position: int
    limit: int
    eos_token_ids: tuple[int, ...]
    chooser: TokenChooser
    on_token: Callable[[int], None] | None = None


def run_decode(components: Components, prefill: Prefill, decoding: Decoding, timer: Timer) -> tuple[int, ...]:
    """Generate until an end token or the limit.

    Returns:
        The generated ids, the end token included.
    """
    embed = components.runners["embed_tokens"]
    one = np.zeros(1, dtype=np.int64)  # one position is the visual index and is kept: nothing is dropped
    logits, caches = prefill.logits, prefill.caches
    tokens: list[int] = []
    while True:
        token = decoding.chooser.choose(logits)
        tokens.append(token)
        if decoding.on_token:
            decoding.on_token(token)
        if token in decoding.eos_token_ids or len(tokens) == decoding.limit:
            return tuple(tokens)
        position = decoding.next_position + len(tokens) - 1
        with timer.stage("decode"):
            feeds: dict[str, Feed] = {
                **embed.run({"input_ids": np.array([[token]], dtype=np.int64)}),
                "position_ids": np.full((components.dims.position_axes, 1, 1), position, dtype=np.int64),
                "visual_index": one,
                "keep_slots": one,
            }
            head, tail = step(components, feeds, caches, (timer, "decode_head", "decode_tail"))
            logits = tail["logits"].numpy().reshape(-1)
            caches = past_feeds({**head, **tail})

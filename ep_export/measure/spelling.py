"""Right answers as the tokens a model would say them in.

Greedy decoding gives a certain answer exactly when, fed that answer, the model's top token is the next one at
every position and an end token after the last. So a whole answer is judged by one teacher-forced pass, all
ways of pruning in one batch, and nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ep_export.errors import UserError
from ep_export.families.processor_files import load_tokenizer
from ep_export.measure.question import normalise

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["Speller", "says"]


class Speller:
    """Text to token ids and back, with the checkpoint's tokenizer.

    Args:
        checkpoint: Directory with the tokenizer's files.
        end: Ids that end an answer; the first closes the answers written here.
    """

    def __init__(self, checkpoint: Path, end: Sequence[int]) -> None:
        self._tokenizer: Any = load_tokenizer(checkpoint)
        self.end = tuple(end)

    def words(self, text: str) -> list[int]:
        """Ids of a text alone, without special tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def spell(self, answer: str) -> list[int]:
        """Ids of an answer with its end token.

        Raises:
            UserError: The tokenizer cannot write it: read back it is another text.
        """
        ids = self.words(answer)
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not ids or normalise(text) != normalise(answer):
            raise UserError(f"the model's tokenizer cannot write the answer {answer!r}: it becomes {text!r}")
        return [*ids, self.end[0]]


def says(log_probs: torch.Tensor, answer: Sequence[int], end: Sequence[int]) -> bool:
    """Whether greedy decoding gives this answer.

    Args:
        log_probs: [len(answer), vocab], predictions when fed the answer.
        answer: Its ids; the last ends it.
        end: Ids that end an answer, any of which counts in the last place.
    """
    top = log_probs.argmax(dim=-1).tolist()
    return top[:-1] == list(answer[:-1]) and top[-1] in end

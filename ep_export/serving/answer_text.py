"""Text from token ids as they come, and where it has to stop.

A token is no text: a character may need several, and some tokenizers write a word's space only in front of
the next one. So a piece is what the tokens since the last clean end add to the text of those before them (the
window of Hugging Face's text-generation-inference), and a character is held back until it is whole. What may
be the beginning of a stop text is held back too. What was given cannot be taken back: of bytes that are no
text some tokenizers say something else once more of them come, and only such answers may differ from what
they make of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["AnswerText"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers make of the bytes of half a character."""


class AnswerText:
    """The text of one answer.

    Args:
        decode: Token ids -> text, special tokens dropped.
        stop: Texts that end the answer.

    Attributes:
        text: All pieces given so far.
        stopped: Whether a stop text came; nothing is given from it on.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._before, self._clean = 0, 0
        self._held = ""

    def push(self, token: int) -> str:
        """One more token; returns the text that is certain now, often none."""
        self._tokens.append(token)
        added = self._added()
        if added.endswith(_INCOMPLETE):
            return ""
        self._before, self._clean = self._clean, len(self._tokens)
        return self._give(added)

    def end(self) -> str:
        """No more tokens come; returns what was held back."""
        added = self._added()
        self._clean = len(self._tokens)
        return self._give(added, last=True)

    def _added(self) -> str:
        """What the tokens after the last clean end add to the text of the window before it."""
        known = self._decode(self._tokens[self._before : self._clean])
        return self._decode(self._tokens[self._before :])[len(known) :]

    def _give(self, added: str, *, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + added
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            piece, self._held = text[: min(found)], ""
        else:
            certain = len(text) if last else len(text) - self._may_begin(text)
            piece, self._held = text[:certain], text[certain:]
        self.text += piece
        return piece

    def _may_begin(self, text: str) -> int:
        """Characters at the end of `text` that a stop text may begin with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

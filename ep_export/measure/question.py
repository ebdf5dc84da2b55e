"""One question about one picture, what came of it, and why one could not be asked. Data, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from ep_export.measure.pictures import PictureFile

__all__ = ["Question", "QuestionResult", "Skipped", "WayResult", "normalise"]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        picture: The file.
        digest: SHA-256 of the picture's bytes.
        text: As asked.
        answers: Right answers, any of which counts; empty where none is known.
        kind: What the prompts call its kind; None where they do not.
    """

    picture: PictureFile
    digest: str
    text: str
    answers: tuple[str, ...] = ()
    kind: str | None = None

    @property
    def key(self) -> str:
        """Hash of all of it: its name in the journal."""
        return hashlib.sha256("\0".join([self.digest, self.text, *self.answers]).encode()).hexdigest()

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.picture.name}: {self.text}"


@dataclass(frozen=True)
class Skipped:
    """A picture or question that could not be used: its name, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class WayResult:
    """One way of pruning on one question; a value a draw.

    Attributes:
        kl: Mean KL(full || pruned) over the positions of the unpruned model's own answer, nats.
        agreement: Share of these positions where the unpruned model's top token stays on top.
        right: "1" or "0" a draw; empty where no right answer is known.
        kept: For every cut the visual tokens that go on; of a picture scaled down all it has.
        vision_flops: Of a picture scaled down, what its vision encoder costs; None where it is the picture's
            own.
    """

    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    right: str
    kept: tuple[int, ...] = ()
    vision_flops: int | None = None


@dataclass(frozen=True)
class QuestionResult:
    """Everything kept of one question: its size does not depend on the picture's.

    Attributes:
        key: See `Question.key`.
        visual_tokens: N.
        text_tokens: Other tokens of the prompt.
        answer_tokens: Positions of the unpruned model's answer.
        full_answer: What the unpruned model says.
        full_right: Whether that is right; None where it is not known.
        query_entropy: [L] nats; empty for a picture that another question has measured.
        key_entropy: [L] nats.
        ways: Way key -> result; ways whose keep is impossible on this picture are left out.
        vision_flops: Of the vision encoder on the picture as it is.
        metrics: Key of every `ep_export.entropy.LayerMetric` -> [L]; empty as `query_entropy` is.
    """

    key: str
    visual_tokens: int
    text_tokens: int
    answer_tokens: int
    full_answer: str
    full_right: bool | None
    query_entropy: tuple[float, ...]
    key_entropy: tuple[float, ...]
    ways: Mapping[str, WayResult]
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    vision_flops: int = 0


def normalise(text: str) -> str:
    """An answer as it is compared: no outer space or final stop, one space between words, case ignored."""
    return " ".join(text.split()).rstrip(".!").rstrip().casefold()

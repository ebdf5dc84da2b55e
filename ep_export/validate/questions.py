"""What a bundle is asked: every picture, two pictures at once, a video, and text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.bundle import Manifest
from ep_export.errors import UserError
from ep_export.families.base import Video
from ep_export.testcards import make_cards

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.families.base import PromptBuilder, PromptInputs, Visual

__all__ = ["Question", "check_asked", "make_clip", "questions"]

_FRAMES = 4  # two parts where two frames are one
_FRAME_SIZE = (224, 224)
_VIDEO_ENCODER = "video_encoder"


@dataclass(frozen=True)
class Question:
    """One prompt to validate with.

    Attributes:
        name: For the report.
        pictures: Numbers among the pictures given to `validate`, in prompt order.
        prompt: The question.
        clip: Whether it is about `make_clip()` instead.
    """

    name: str
    pictures: tuple[int, ...]
    prompt: str
    clip: bool = False

    def visuals(self, pictures: Sequence[Image.Image]) -> list[Visual]:
        """What is shown, given the pictures of `validate`."""
        return [make_clip()] if self.clip else [pictures[i] for i in self.pictures]

    def build(self, prompts: PromptBuilder, pictures: Sequence[Image.Image]) -> PromptInputs:
        """Its arrays.

        Raises:
            UserError: See `PromptBuilder.build`.
        """
        return prompts.build(self.visuals(pictures), self.prompt)


def make_clip() -> Video:
    """A short video of test cards, the same on every machine."""
    return Video(make_cards((_FRAME_SIZE,) * _FRAMES), fps=1.0)


def check_asked(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Refuse to validate on nothing.

    Raises:
        UserError: No picture, or no question.
    """
    if not pictures or not prompts:
        raise UserError(
            f"validation got {len(pictures)} pictures and {len(prompts)} prompts, expected some of each",
            hint="give a picture and a question",
        )


def questions(
    manifest: Manifest, builder: PromptBuilder, pictures: int, prompts: Sequence[str]
) -> tuple[list[Question], str]:
    """Everything a bundle is asked.

    Every picture with one of the prompts in turn (and every prompt once); then two pictures, where there are
    two; a video, where the model takes any; and no picture.

    Args:
        manifest: The bundle's.
        builder: Its prompts.
        pictures: How many there are.
        prompts: The questions.

    Returns:
        The questions; and why there is none about a video, empty where there is one.

    Raises:
        UserError: The bundle has an encoder for videos, and none can be asked about.
    """
    every = [
        Question(f"question {i + 1}", (i % pictures,), prompts[i % len(prompts)])
        for i in range(max(pictures, len(prompts)))
    ]
    if pictures > 1:
        every.append(Question("two pictures", (0, 1), prompts[0]))
    clip, reason = Question("a video", (), prompts[0], clip=True), ""
    try:
        clip.build(builder, ())
        every.append(clip)
    except UserError as error:
        if any(component.name == _VIDEO_ENCODER for component in manifest.components):
            raise
        reason = str(error)
    return [*every, Question("no picture", (), prompts[0])], reason

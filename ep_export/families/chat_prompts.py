"""Pictures, videos and a question as arrays; what the prompt builders of all families share.

What differs between families is left to hooks, the methods with one underscore: a picture and a video after
the processor (`_process`, `_process_video`), what stands in the prompt for them (`_write`, `_expand`), and
positions (`_positions`). No torch: this runs on a Jetson.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError, as_user_error
from ep_export.families import processor_files as files
from ep_export.families.base import Picture, PromptInputs, Turn, Video, Visual
from ep_export.families.picture_modes import to_rgb
from ep_export.families.template_limits import check_template, rendering

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig

__all__ = ["ChatPrompts", "Parts"]

Parts: TypeAlias = "tuple[Picture, ...]"
"""What one placeholder of the chat template stands for: a picture alone, or all parts of one video."""

# Beyond this ratio of sides a picture is a line: Qwen's image processor refuses it, and CLIP's would blow its
# short side up to hundreds of megabytes.
_MAX_ASPECT = 200
# Characters a template may add to the question: some thousand times what published ones do.
_MOST_MARKUP = 1 << 20
_TOKENIZER_HINT = "copy tokenizer.json and tokenizer_config.json from the checkpoint again"


class ChatPrompts(ABC):
    """What the prompt builders of all families share; see `ep_export.families.base.PromptBuilder`.

    Attributes:
        eos_token_ids: Ids that end an answer.
        repetition_penalty: From generation_config.json; 1 is none.
    """

    def __init__(
        self, processor: Path, config: PreTrainedConfig, *, image_processor: Any, areas: bool = False
    ) -> None:
        """Load tokenizer and chat template from a local directory.

        Args:
            processor: The directory.
            config: The model's config.
            image_processor: The `...Pil` class of transformers, loaded from there too.
            areas: See `ep_export.families.bounds.check_settings`.

        Raises:
            UserError: A file is missing or unusable.
        """
        if not processor.is_dir():
            raise UserError(f"processor directory {processor} is missing", hint="build the bundle again")
        self._tokenizer = files.load_tokenizer(processor)
        self._images = files.load_image_processor(processor, image_processor, areas=areas)
        self._template = files.chat_template(processor, self._tokenizer)
        self._image_id: int = config.image_token_id
        self._video_id: int | None = getattr(config, "video_token_id", None)
        self._max_positions: int = config.text_config.max_position_embeddings
        self._family: str = config.model_type
        self._special = files.special_tokens(self._tokenizer)
        generation = files.generation_config(processor)
        self.eos_token_ids = files.eos_token_ids(generation, config, self._tokenizer)
        self.repetition_penalty = files.repetition_penalty(generation)

    @abstractmethod
    def _process(self, pixels: NDArray[np.uint8]) -> Picture:
        """One picture through the image processor.

        Args:
            pixels: [height, width, 3] RGB.
        """

    def _process_video(self, video: Video) -> Parts:  # noqa: ARG002 - for families that take videos
        """One video through the video processor: its parts in order, one a call of a vision encoder.

        `Picture.video` is filled in by the caller.

        Args:
            video: Frames of one size, at least one; `_frames` gives them as arrays.

        Raises:
            UserError: The family takes no videos.
        """
        raise UserError(
            f"family {self._family} takes no videos", hint="give single frames of it as pictures instead"
        )

    def _write(self, text: str, groups: Sequence[Parts]) -> str:  # noqa: ARG002 - few families write text
        """The rendered template as it is tokenized.

        For families that put words around or between visual tokens. What is left of placeholders goes
        through `_expand` afterwards.

        Args:
            text: What the chat template rendered.
            groups: What its placeholders stand for, in prompt order.
        """
        return text

    def _positions(
        self,
        input_ids: NDArray[np.int64],
        pictures: Sequence[Picture],  # noqa: ARG002 - families with positions in the picture read them
    ) -> tuple[NDArray[np.int64], int]:
        """Position ids [A, S] and the position of the first generated token: a plain count, one axis."""
        length = input_ids.shape[0]
        return np.arange(length, dtype=np.int64)[None], length

    def build(self, visuals: Sequence[Visual], prompt: str) -> PromptInputs:
        """Apply the chat template with pictures and videos before the question, as Hugging Face would.

        Args:
            visuals: In the order they stand in the prompt; pictures and frames of any PIL mode.
            prompt: The question.

        Raises:
            UserError: The question holds one of the model's special tokens, a picture is too narrow, the
                family takes no videos, or the prompt is longer than the model's context.
        """
        return self.build_chat((Turn("user", (*visuals, prompt)),))

    def build_chat(self, turns: Sequence[Turn]) -> PromptInputs:
        """Apply the chat template to a conversation, as Hugging Face would.

        Args:
            turns: From the first to the one to be answered; pictures and frames of any PIL mode.

        Raises:
            UserError: As `build`, or the template has no place for a turn.
        """
        for turn in turns:
            for text in _texts(turn):
                self._refuse_special(text)
        groups = self._groups([part for turn in turns for part in turn.parts if not isinstance(part, str)])
        pictures = tuple(part for parts in groups for part in parts)
        input_ids = self._expand(self._tokenize(groups, turns), groups)
        visual = np.isin(input_ids, self._placeholders)
        expected = sum(picture.visual_tokens for picture in pictures)
        if int(visual.sum()) != expected:
            raise UserError(
                f"the prompt holds {int(visual.sum())} visual tokens, {expected} were made of what was given",
                hint="use the model's published chat template and tokenizer",
            )
        if input_ids.shape[0] > self._max_positions:
            raise UserError(
                f"prompt has {input_ids.shape[0]} tokens ({expected} of pictures), the model's context holds "
                f"{self._max_positions}",
                hint="use fewer or smaller pictures, fewer frames, or a shorter question",
            )
        positions, following = self._positions(input_ids, pictures)
        return PromptInputs(
            input_ids=input_ids[None],
            position_ids=positions[:, None],
            visual_index=np.flatnonzero(visual).astype(np.int64),
            next_position=following,
            pictures=pictures,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens dropped."""
        with as_user_error("the checkpoint's tokenizer fails on an answer", hint=_TOKENIZER_HINT):
            text: str = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text

    def _refuse_special(self, prompt: str) -> None:
        """A question must not place pictures or end turns: its text is data, not markup."""
        for token in self._special:
            if token in prompt:
                raise UserError(
                    f"prompt contains {token!r}, a special token of the model",
                    hint="write it another way; give pictures as pictures",
                )

    @property
    def _placeholders(self) -> list[int]:
        """Ids of the tokens that visual embeddings replace."""
        return [token for token in (self._image_id, self._video_id) if token is not None]

    def _groups(self, visuals: Sequence[Visual]) -> tuple[Parts, ...]:
        """Everything through the processors, videos numbered."""
        made: list[Parts] = []
        videos = 0
        for visual in visuals:
            if isinstance(visual, Video):
                made.append(tuple(replace(part, video=videos) for part in self._process_video(visual)))
                videos += 1
            else:
                made.append((self._process(_pixels(visual, "picture")),))
        return tuple(made)

    def _frames(self, video: Video) -> NDArray[np.uint8]:
        """Frames as [frames, height, width, 3] RGB.

        Raises:
            UserError: There is none, they differ in size, are too narrow, or know no speed.
        """
        if not 0 < video.fps < float("inf"):
            raise UserError(
                f"video shows {video.fps:g} frames a second", hint="give a number of frames above 0"
            )
        frames = [_pixels(frame, "video frame") for frame in video.frames]
        sizes = sorted({frame.shape[1::-1] for frame in frames})
        if len(sizes) != 1:
            found = " and ".join(f"{width} x {height}" for width, height in sizes) or "none"
            raise UserError(
                f"video has frames of {found}, expected one size", hint="give frames of one video"
            )
        return np.stack(frames)

    def _tokenize(self, groups: Sequence[Parts], turns: Sequence[Turn]) -> NDArray[np.int64]:
        """Token ids of the rendered template."""
        hint = "use the model's published template"
        check_template(self._template)
        # Rendered by transformers in a sandbox: the template comes with the checkpoint.
        with as_user_error("the checkpoint's chat template fails", hint=hint), rendering():
            text = self._tokenizer.apply_chat_template(
                [{"role": turn.role, "content": [_content(part) for part in turn.parts]} for turn in turns],
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        told = sum(len(part) for turn in turns for part in _texts(turn))
        if len(text) > told + _MOST_MARKUP:
            raise UserError(
                f"the checkpoint's chat template makes {len(text)} characters of a question of {told}",
                hint=hint,
            )
        if len(turns) > 1:
            _check_told(text, turns)
        text = self._write(text, groups)
        # As Hugging Face's processors: a template that begins the sequence itself is not begun twice.
        begun = self._tokenizer.bos_token is not None and text.startswith(self._tokenizer.bos_token)
        with as_user_error("the checkpoint's tokenizer fails on the question", hint=_TOKENIZER_HINT):
            ids = self._tokenizer(text, add_special_tokens=not begun)["input_ids"]
            return np.asarray(ids, dtype=np.int64)

    def _expand(self, ids: NDArray[np.int64], groups: Sequence[Parts]) -> NDArray[np.int64]:
        """Repeat every picture's or video's placeholder once a visual token.

        Raises:
            UserError: The template placed something else than what was given.
        """
        found = np.flatnonzero(np.isin(ids, self._placeholders))
        given = [self._image_id if parts[0].video is None else self._video_id for parts in groups]
        if ids[found].tolist() != given:
            pictures = int((ids[found] == self._image_id).sum())
            videos = sum(parts[0].video is not None for parts in groups)
            raise UserError(
                f"the rendered prompt places {pictures} pictures and {len(found) - pictures} videos, "
                f"{len(groups) - videos} and {videos} were given",
                hint="use the model's published chat template and tokenizer",
            )
        repeats = np.ones(ids.shape[0], dtype=np.int64)
        repeats[found] = [sum(part.visual_tokens for part in parts) for parts in groups]
        return np.repeat(ids, repeats)


def _texts(turn: Turn) -> list[str]:
    return [part for part in turn.parts if isinstance(part, str)]


def _content(part: str | Visual) -> dict[str, str]:
    """A part as chat templates read it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video" if isinstance(part, Video) else "image"}


def _check_told(rendered: str, turns: Sequence[Turn]) -> None:
    """Some templates leave out in silence what they have no place for, system messages above all.

    Raises:
        UserError: The words of a turn are not in the prompt, in order.
    """
    end = 0
    for turn in turns:
        for text in _texts(turn):
            start = rendered.find(text.strip(), end)  # templates trim
            if start < 0:
                raise UserError(
                    f"the model's chat template has no place for this message of the role {turn.role}",
                    hint="put its words into a user message",
                )
            end = start + len(text.strip())


def _pixels(picture: Image.Image, what: str) -> NDArray[np.uint8]:
    """[height, width, 3] RGB.

    Raises:
        UserError: It is empty or a line.
    """
    width, height = picture.size
    if min(width, height) < 1:
        raise UserError(f"{what} has size {width} x {height}", hint="give a picture with at least one pixel")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise UserError(
            f"{what} of {width} x {height} pixels is over {_MAX_ASPECT} times as long as it is narrow",
            hint="crop it",
        )
    return np.asarray(to_rgb(picture))

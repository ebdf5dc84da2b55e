"""Pictures and a question as arrays, for families with one run of placeholders where a picture stands.

What differs between families is left to two methods: a picture after the image processor, and positions.
No torch: this runs on a Jetson.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.families import processor_files as files
from ep_export.families.base import Picture, PromptInputs
from ep_export.families.picture_modes import to_rgb

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig

__all__ = ["ChatPrompts"]

# Beyond this ratio of sides a picture is a line: Qwen's image processor refuses it, and CLIP's would blow its
# short side up to hundreds of megabytes.
_MAX_ASPECT = 200


class ChatPrompts(ABC):
    """What the prompt builders of all families share; see `ep_export.families.base.PromptBuilder`.

    Attributes:
        eos_token_ids: Ids that end an answer.
        repetition_penalty: From generation_config.json; 1 is none.
    """

    def __init__(self, processor: Path, config: PreTrainedConfig, *, image_processor: Any) -> None:
        """Load tokenizer and chat template from a local directory.

        Args:
            processor: The directory.
            config: The model's config.
            image_processor: The `...Pil` class of transformers, loaded from there too.

        Raises:
            UserError: A file is missing or unusable.
        """
        if not processor.is_dir():
            raise UserError(f"processor directory {processor} is missing", hint="build the bundle again")
        self._tokenizer = files.load_tokenizer(processor)
        self._images = files.load_image_processor(processor, image_processor)
        self._template = files.chat_template(processor, self._tokenizer)
        self._image_id: int = config.image_token_id
        self._video_id: int | None = getattr(config, "video_token_id", None)
        self._max_positions: int = config.text_config.max_position_embeddings
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

    def _positions(
        self,
        input_ids: NDArray[np.int64],
        pictures: Sequence[Picture],  # noqa: ARG002 - families with positions in the picture read them
    ) -> tuple[NDArray[np.int64], int]:
        """Position ids [A, S] and the position of the first generated token: a plain count, one axis."""
        length = input_ids.shape[0]
        return np.arange(length, dtype=np.int64)[None], length

    def build(self, pictures: Sequence[Image.Image], prompt: str) -> PromptInputs:
        """Apply the chat template with the pictures before the question, as Hugging Face would.

        Args:
            pictures: In the order they stand in the prompt; any PIL mode.
            prompt: The question.

        Raises:
            UserError: The question holds one of the model's special tokens, a picture is too narrow, or the
                prompt is longer than the model's context.
        """
        self._refuse_special(prompt)
        ready = tuple(self._picture(picture) for picture in pictures)
        input_ids = self._expand(self._tokenize(len(ready), prompt), ready)
        if input_ids.shape[0] > self._max_positions:
            visual = sum(picture.visual_tokens for picture in ready)
            raise UserError(
                f"prompt has {input_ids.shape[0]} tokens ({visual} of pictures), the model's context holds "
                f"{self._max_positions}",
                hint="use fewer or smaller pictures, or a shorter question",
            )
        positions, following = self._positions(input_ids, ready)
        return PromptInputs(
            input_ids=input_ids[None],
            position_ids=positions[:, None],
            visual_index=np.flatnonzero(input_ids == self._image_id).astype(np.int64),
            next_position=following,
            pictures=ready,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens dropped."""
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

    def _picture(self, picture: Image.Image) -> Picture:
        width, height = picture.size
        if min(width, height) < 1:
            raise UserError(
                f"picture has size {width} x {height}", hint="give a picture with at least one pixel"
            )
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise UserError(
                f"picture of {width} x {height} pixels is over {_MAX_ASPECT} times as long as it is narrow",
                hint="crop it",
            )
        return self._process(np.asarray(to_rgb(picture)))

    def _tokenize(self, pictures: int, prompt: str) -> NDArray[np.int64]:
        """Token ids of the rendered template, one placeholder a picture."""
        import jinja2

        content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": prompt}]
        try:
            # Rendered by transformers in a sandbox: the template comes with the checkpoint.
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint's chat template fails: {error}", hint="use the model's published template"
            ) from error
        # As Hugging Face's processors: a template that begins the sequence itself is not begun twice.
        begun = self._tokenizer.bos_token is not None and text.startswith(self._tokenizer.bos_token)
        ids = np.asarray(self._tokenizer(text, add_special_tokens=not begun)["input_ids"], dtype=np.int64)
        found = int((ids == self._image_id).sum())
        videos = 0 if self._video_id is None else int((ids == self._video_id).sum())
        if (found, videos) != (pictures, 0):
            raise UserError(
                f"the rendered prompt places {found} pictures and {videos} videos, {pictures} were given",
                hint="use the model's published chat template and tokenizer",
            )
        return ids

    def _expand(self, ids: NDArray[np.int64], pictures: Sequence[Picture]) -> NDArray[np.int64]:
        """Repeat every picture's placeholder once a visual token."""
        repeats = np.ones(ids.shape[0], dtype=np.int64)
        repeats[ids == self._image_id] = [picture.visual_tokens for picture in pictures]
        return np.repeat(ids, repeats)

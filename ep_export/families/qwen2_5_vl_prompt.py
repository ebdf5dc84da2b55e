"""Pictures and a question as Qwen2.5-VL's arrays: tokenizer, template, image processor; without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.families.base import Picture, PromptInputs
from ep_export.families.mrope import mrope_positions
from ep_export.families.picture_modes import to_rgb

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig

__all__ = ["Qwen2_5_VLPrompts"]

# Beyond this ratio of sides the image processor refuses a picture.
_MAX_ASPECT = 200


class Qwen2_5_VLPrompts:  # noqa: N801 - the model's name
    """The prompt builder; see `ep_export.families.base.PromptBuilder`.

    Attributes:
        eos_token_ids: Ids that end an answer.
        repetition_penalty: From generation_config.json; 1 is none.
    """

    def __init__(self, processor: Path, config: PreTrainedConfig) -> None:
        """Load tokenizer, chat template and image processor from a local directory.

        Raises:
            UserError: A file is missing or unusable.
        """
        if not processor.is_dir():
            raise UserError(f"processor directory {processor} is missing", hint="build the bundle again")
        self._tokenizer = _load_tokenizer(processor)
        self._images = _load_image_processor(processor)
        self._template = _chat_template(processor, self._tokenizer)
        self._image_id: int = config.image_token_id
        self._video_id: int = config.video_token_id
        self._max_positions: int = config.text_config.max_position_embeddings
        self._special = _special_tokens(self._tokenizer)
        generation = _generation_config(processor)
        self.eos_token_ids = _eos_token_ids(generation, config, self._tokenizer)
        self.repetition_penalty = _repetition_penalty(generation)

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
            visual = sum(height * width for height, width in (p.token_grid for p in ready))
            raise UserError(
                f"prompt has {input_ids.shape[0]} tokens ({visual} of pictures), the model's context holds "
                f"{self._max_positions}",
                hint="use fewer or smaller pictures, or a shorter question",
            )
        positions, following = mrope_positions(input_ids, self._image_id, [p.token_grid for p in ready])
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
        # The channel axis is named: a picture three pixels high must not be taken for channels first.
        made = self._images(images=[np.asarray(to_rgb(picture))], input_data_format="channels_last")
        time, rows, columns = (int(n) for n in made["image_grid_thw"][0])
        merge = int(self._images.merge_size)
        return Picture(
            pixel_values=np.ascontiguousarray(made["pixel_values"], dtype=np.float32),
            grid=(time, rows, columns),
            token_grid=(rows // merge, columns // merge),
            size=(width, height),
        )

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
        ids = np.asarray(self._tokenizer(text)["input_ids"], dtype=np.int64)
        found, videos = int((ids == self._image_id).sum()), int((ids == self._video_id).sum())
        if (found, videos) != (pictures, 0):
            raise UserError(
                f"the rendered prompt places {found} pictures and {videos} videos, {pictures} were given",
                hint="use the model's published chat template and tokenizer",
            )
        return ids

    def _expand(self, ids: NDArray[np.int64], pictures: Sequence[Picture]) -> NDArray[np.int64]:
        """Repeat every picture's placeholder once a visual token."""
        repeats = np.ones(ids.shape[0], dtype=np.int64)
        repeats[ids == self._image_id] = [p.token_grid[0] * p.token_grid[1] for p in pictures]
        return np.repeat(ids, repeats)


def _load_tokenizer(processor: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(processor, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"tokenizer files in {processor} are missing or broken: {_first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the checkpoint beside its config.json",
        ) from error


def _load_image_processor(processor: Path) -> Any:
    # The class that needs neither torch nor torchvision; AutoProcessor would want both.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        return Qwen2VLImageProcessorPil.from_pretrained(processor, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"preprocessor_config.json in {processor} is missing or broken: {_first_line(error)}",
            hint="copy it from the checkpoint",
        ) from error


def _chat_template(processor: Path, tokenizer: Any) -> str:
    """The processor's template, else the tokenizer's: the order in which Hugging Face looks."""
    jinja, older = processor / "chat_template.jinja", processor / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    if older.is_file():
        found = _json(older).get("chat_template")
        if isinstance(found, str):
            return found
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise UserError(
        f"{processor} has no chat template", hint="copy chat_template.json of the checkpoint there"
    )


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*added, *tokenizer.all_special_tokens}))


def _generation_config(processor: Path) -> dict[str, Any]:
    file = processor / "generation_config.json"
    return _json(file) if file.is_file() else {}


def _eos_token_ids(generation: dict[str, Any], config: PreTrainedConfig, tokenizer: Any) -> tuple[int, ...]:
    """generation_config.json first, as `generate` of Hugging Face; then the config; then the tokenizer."""
    candidates = (
        generation.get("eos_token_id"),
        getattr(config.text_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    )
    for found in candidates:
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found and all(isinstance(item, int) for item in found):
            return tuple(found)
    raise UserError(
        "the checkpoint names no token that ends an answer",
        hint="copy its generation_config.json beside config.json",
    )


def _repetition_penalty(generation: dict[str, Any]) -> float:
    found = generation.get("repetition_penalty")
    if found is None:
        return 1.0
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not found > 0:
        raise UserError(
            f"generation_config.json has repetition_penalty {found!r}, expected a number above 0",
            hint="copy the file from the checkpoint again",
        )
    return float(found)


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is not readable JSON: {error}", hint="copy it from the checkpoint again"
        ) from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds {type(raw).__name__}, expected an object", hint="copy it again")
    return raw


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

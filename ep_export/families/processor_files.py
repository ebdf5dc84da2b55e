"""Tokenizer, chat template, image processor and generation settings from a directory; without torch.

The files come with a checkpoint and are not trusted: templates are rendered by transformers in a sandbox, no
code is run, and whatever is missing or broken is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ep_export.documents import read_json_object
from ep_export.errors import UserError, as_user_error
from ep_export.families.bounds import check_settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "chat_template",
    "eos_token_ids",
    "generation_config",
    "image_settings",
    "load_image_processor",
    "load_tokenizer",
    "prepare",
    "read_settings",
    "repetition_penalty",
    "special_tokens",
    "video_settings",
]

_COPY = "copy it from the checkpoint again"
# Published: 1.05 and below; far above, every answer ends at once.
_MOST_PENALTY = 100.0
_MOST_ID = 1 << 31


def load_tokenizer(processor: Path) -> Any:
    """The tokenizer of a directory.

    Raises:
        UserError: Its files are missing or broken.
    """
    from transformers import AutoTokenizer

    sentence = f"tokenizer files in {processor} are missing or broken"
    hint = "copy tokenizer.json and tokenizer_config.json of the checkpoint beside its config.json"
    with as_user_error(sentence, hint=hint):
        return AutoTokenizer.from_pretrained(processor, local_files_only=True, trust_remote_code=False)


def load_image_processor(processor: Path, kind: Any, *, areas: bool = False) -> Any:
    """The image processor of a directory.

    Args:
        processor: The directory.
        kind: A `...Pil` class of transformers: those need neither torch nor torchvision, AutoProcessor both.
        areas: See `ep_export.families.bounds.check_settings`.

    Raises:
        UserError: Its file is missing or broken.
    """
    sentence = f"preprocessor_config.json in {processor} is missing or broken"
    check_settings(image_settings(processor), f"preprocessor_config.json in {processor}", areas=areas)
    with as_user_error(sentence, hint=_COPY):
        return kind.from_pretrained(processor, local_files_only=True)


def prepare(processor: Any, images: Sequence[Any], **options: Any) -> Any:
    """What an image processor makes of pictures.

    Args:
        processor: From `load_image_processor`.
        images: As it takes them, each [height, width, 3].
        options: Of this call.

    Raises:
        UserError: Its settings, which come with the checkpoint, are no settings, or make no numbers.
    """
    sentence = "the checkpoint's image processor fails on a picture"
    with as_user_error(sentence, hint=_COPY), np.errstate(all="ignore"):
        # The channel axis is named: a picture three pixels high must not be taken for channels first.
        made = processor(images=images, input_data_format="channels_last", **options)
        values = made["pixel_values"]  # an array, or a list of them where pictures differ in size
        finite = all(np.isfinite(part).all() for part in (values if isinstance(values, list) else [values]))
    if not finite:
        raise UserError(f"{sentence}: it makes values that are not finite", hint=_COPY)
    return made


def chat_template(processor: Path, tokenizer: Any) -> str:
    """The processor's template, else the tokenizer's: the order in which Hugging Face looks.

    Raises:
        UserError: There is none.
    """
    jinja, older = processor / "chat_template.jinja", processor / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")  # the tokenizer has read it too
    if older.is_file():
        found = read_settings(older).get("chat_template")
        if isinstance(found, str):
            return found
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise UserError(
        f"{processor} has no chat template", hint="copy chat_template.json of the checkpoint there"
    )


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Every token that is markup and not text."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*added, *tokenizer.all_special_tokens}))


def generation_config(processor: Path) -> dict[str, Any]:
    """generation_config.json, empty when there is none.

    Raises:
        UserError: It is broken.
    """
    file = processor / "generation_config.json"
    return read_settings(file) if file.is_file() else {}


def eos_token_ids(generation: dict[str, Any], config: PreTrainedConfig, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer.

    generation_config.json first, as `generate` of Hugging Face; then the config; then the tokenizer.

    Raises:
        UserError: None of them names one.
    """
    candidates = (
        generation.get("eos_token_id"),
        getattr(config.text_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    )
    for found in candidates:
        ids = found if isinstance(found, list) else [found]
        if ids and all(type(item) is int and 0 <= item <= _MOST_ID for item in ids):
            return tuple(ids)
    raise UserError(
        "the checkpoint names no token that ends an answer",
        hint="copy its generation_config.json beside config.json",
    )


def repetition_penalty(generation: dict[str, Any]) -> float:
    """The penalty generation_config.json asks for; 1 is none.

    Raises:
        UserError: It is no number above 0, or too large to be one.
    """
    found = generation.get("repetition_penalty")
    if found is None:
        return 1.0
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found <= _MOST_PENALTY:
        raise UserError(
            f"generation_config.json has repetition_penalty {found!r}, expected a number above 0, at most "
            f"{_MOST_PENALTY:g}",
            hint="copy the file from the checkpoint again",
        )
    return float(found)


def video_settings(processor: Path) -> dict[str, Any]:
    """Settings of the video processor, from the file where Hugging Face looks; empty when there is none.

    A part of processor_config.json, else a file of its own, else the image processor's.

    Raises:
        UserError: The file is broken.
    """
    own, shared = "video_preprocessor_config.json", "preprocessor_config.json"
    return _settings(processor, "video_processor", own if (processor / own).is_file() else shared)


def image_settings(processor: Path) -> dict[str, Any]:
    """Settings of the image processor, from the file where Hugging Face looks; empty when there is none.

    A part of processor_config.json, else a file of its own.

    Raises:
        UserError: The file is broken.
    """
    return _settings(processor, "image_processor", "preprocessor_config.json")


def _settings(processor: Path, part: str, own: str) -> dict[str, Any]:
    whole = processor / "processor_config.json"
    nested = read_settings(whole).get(part) if whole.is_file() else None
    if isinstance(nested, dict):
        return nested
    return read_settings(processor / own) if (processor / own).is_file() else {}


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: The file is no JSON, or holds something else.
    """
    return read_json_object(file, hint=_COPY)

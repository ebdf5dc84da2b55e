"""Tokenizer, chat template, image processor and generation settings from a directory; without torch.

The files come with a checkpoint and are not trusted: templates are rendered by transformers in a sandbox, no
code is run, and whatever is missing or broken is named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "chat_template",
    "eos_token_ids",
    "generation_config",
    "load_image_processor",
    "load_tokenizer",
    "read_json",
    "repetition_penalty",
    "special_tokens",
    "video_settings",
]


def load_tokenizer(processor: Path) -> Any:
    """The tokenizer of a directory.

    Raises:
        UserError: Its files are missing or broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(processor, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"tokenizer files in {processor} are missing or broken: {_first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the checkpoint beside its config.json",
        ) from error


def load_image_processor(processor: Path, kind: Any) -> Any:
    """The image processor of a directory.

    Args:
        processor: The directory.
        kind: A `...Pil` class of transformers: those need neither torch nor torchvision, AutoProcessor both.

    Raises:
        UserError: Its file is missing or broken.
    """
    try:
        return kind.from_pretrained(processor, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"preprocessor_config.json in {processor} is missing or broken: {_first_line(error)}",
            hint="copy it from the checkpoint",
        ) from error


def chat_template(processor: Path, tokenizer: Any) -> str:
    """The processor's template, else the tokenizer's: the order in which Hugging Face looks.

    Raises:
        UserError: There is none.
    """
    jinja, older = processor / "chat_template.jinja", processor / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    if older.is_file():
        found = read_json(older).get("chat_template")
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
    return read_json(file) if file.is_file() else {}


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
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found and all(isinstance(item, int) for item in found):
            return tuple(found)
    raise UserError(
        "the checkpoint names no token that ends an answer",
        hint="copy its generation_config.json beside config.json",
    )


def repetition_penalty(generation: dict[str, Any]) -> float:
    """The penalty generation_config.json asks for; 1 is none.

    Raises:
        UserError: It is no number above 0.
    """
    found = generation.get("repetition_penalty")
    if found is None:
        return 1.0
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not found > 0:
        raise UserError(
            f"generation_config.json has repetition_penalty {found!r}, expected a number above 0",
            hint="copy the file from the checkpoint again",
        )
    return float(found)


def video_settings(processor: Path) -> dict[str, Any]:
    """Settings of the video processor, from the file where Hugging Face looks; empty when there is none.

    A part of processor_config.json, else a file of its own, else the image processor's.

    Raises:
        UserError: The file is broken.
    """
    whole = processor / "processor_config.json"
    nested = read_json(whole).get("video_processor") if whole.is_file() else None
    if isinstance(nested, dict):
        return nested
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (processor / name).is_file():
            return read_json(processor / name)
    return {}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: The file is no JSON, or holds something else.
    """
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

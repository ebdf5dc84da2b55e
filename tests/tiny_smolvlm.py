"""Random SmolVLM and Idefics3 checkpoints small enough to run in tests, complete enough for Hugging Face."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tiny_llava import Layout, save_tiny, text_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Idefics3Config, PreTrainedConfig, PreTrainedTokenizerFast, SmolVLMConfig

__all__ = ["SMOLVLM_TEMPLATE", "make_tiny_smolvlm", "smolvlm_config", "smolvlm_tokenizer"]

# The published checkpoints' template, word for word: it knows no videos.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_CONFIGS = {"smolvlm": SmolVLMConfig, "idefics3": Idefics3Config}
_VOCAB_ROWS = 224  # more rows than tokens, as in the published checkpoints
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
_WORDS = (
    "User Assistant What is in the picture which digits are there hello red green one two three four You "
    "provided following series of frames from a video Frame"
)


def make_tiny_smolvlm(path: Path, **changes: Any) -> Path:
    """Write a checkpoint directory.

    Args:
        path: Directory to create.
        changes: `seed` of the weights, `max_shard_size` of the files, `tiles_along` the longer side of a
            picture; everything else is for `smolvlm_config`.
    """
    seed, shards = changes.pop("seed", 0), changes.pop("max_shard_size", "1GB")
    along = changes.pop("tiles_along", 3)
    config = smolvlm_config(**changes)
    side = config.vision_config.image_size
    preprocessor = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_pad": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "SmolVLMImageProcessor",
        "max_image_size": {"longest_edge": side},
        "resample": 1,
        "size": {"longest_edge": along * side},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": side}},
    }
    return save_tiny(
        path,
        config,
        smolvlm_tokenizer(),
        preprocessor,
        template=SMOLVLM_TEMPLATE,
        seed=seed,
        layout=Layout.TODAY,
        max_shard_size=shards,
    )


def smolvlm_config(model_type: str = "smolvlm", **changes: Any) -> PreTrainedConfig:
    """Tiles of 8 x 8 patches, 16 tokens each; a Llama of 4 layers with grouped heads.

    Args:
        model_type: "smolvlm" or "idefics3".
        changes: `text` and `vision` (mappings) change those configs, everything else the whole.
    """
    tokenizer = smolvlm_tokenizer()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
    }
    text = {
        "num_key_value_heads": 2,
        "vocab_size": _VOCAB_ROWS,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    kind = _CONFIGS[model_type]
    return kind(
        vision_config={**vision, **changes.pop("vision", {})},
        text_config=text_config(**{**text, **changes.pop("text", {})}).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        architectures=[kind.__name__.replace("Config", "ForConditionalGeneration")],
        **changes,
    )


def smolvlm_tokenizer() -> PreTrainedTokenizerFast:
    """Words and letters; two line ends in a row are one token, as in SmolLM2's."""
    characters = string.ascii_letters + string.digits + "?.,!:;'\"()-+/<>|_[]\n"
    words = list(dict.fromkeys([*_SPECIAL, *characters, "\n\n", *_WORDS.split()]))
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))  # noqa: S106 - not a password
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|\d|\n\n?|[^\sA-Za-z\d]"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[ \t\r]+"), behavior="removed"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    named = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",  # noqa: S106
        bos_token="<|im_start|>",  # noqa: S106
        eos_token="<end_of_utterance>",  # noqa: S106
        pad_token="<|im_end|>",  # noqa: S106
        additional_special_tokens=[token for token in _SPECIAL if token not in named],
        clean_up_tokenization_spaces=False,
    )

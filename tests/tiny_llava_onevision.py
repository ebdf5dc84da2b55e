"""Random LLaVA-OneVision checkpoints small enough to run in tests, complete enough for Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_llava import Layout, save_tiny, text_config, tiny_tokenizer
from transformers import LlavaOnevisionConfig, PreTrainedTokenizerFast, SiglipVisionConfig

__all__ = [
    "ONEVISION_RESOLUTIONS",
    "ONEVISION_TEMPLATE",
    "make_tiny_llava_onevision",
    "onevision_tokenizer",
    "siglip_config",
]

# 5 patches a side and 4 pixels left over: odd and uneven, like the published 27 patches and 6 pixels.
IMAGE_SIZE, PATCH_SIZE = 44, 8
ONEVISION_RESOLUTIONS = [[IMAGE_SIZE * i, IMAGE_SIZE * j] for i in (1, 2, 3) for j in (1, 2, 3)]

# The published checkpoints' template, word for word.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
    "{% endfor %}{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}"
    "{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_llava_onevision(path: Path, *, layout: Layout = Layout.TODAY, **changes: Any) -> Path:
    """Write a LLaVA-OneVision checkpoint directory whose grids are scaled down beyond 2 tiles.

    Args:
        path: Directory to create.
        layout: Names of the tensors.
        changes: `text` and `vision` (mappings) change those configs, `seed` the weights, `max_shard_size`
            the files; everything else is for `LlavaOnevisionConfig`.
    """
    tokenizer = onevision_tokenizer()
    end = tokenizer.eos_token_id
    seed, shards = changes.pop("seed", 0), changes.pop("max_shard_size", "1GB")
    config = LlavaOnevisionConfig(
        vision_config=siglip_config(**changes.pop("vision", {})),
        text_config=text_config("qwen2", **{"eos_token_id": end, **changes.pop("text", {})}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=ONEVISION_RESOLUTIONS,
        architectures=["LlavaOnevisionForConditionalGeneration"],
        **{"vision_aspect_ratio": "anyres_max_2", **changes},
    )
    preprocessor = {
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_grid_pinpoints": ONEVISION_RESOLUTIONS,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
    }
    return save_tiny(
        path,
        config,
        tokenizer,
        preprocessor,
        template=ONEVISION_TEMPLATE,
        seed=seed,
        layout=layout,
        max_shard_size=shards,
    )


def siglip_config(**changes: Any) -> SiglipVisionConfig:
    """A SigLIP tower of 25 patches."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "vision_use_head": False,
    }
    return SiglipVisionConfig(**{**shape, **changes})


def onevision_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen's: nothing begins a sequence, turns are marked."""
    return tiny_tokenizer(("<image>", "<video>", "<|im_start|>"), begin=None, end="<|im_end|>")

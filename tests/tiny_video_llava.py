"""Random Video-LLaVA checkpoints small enough to run in tests, complete enough for Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_llava import IMAGE_SIZE, Layout, save_tiny, text_config, tiny_tokenizer, vision_config
from transformers import PreTrainedTokenizerFast, VideoLlavaConfig

__all__ = ["VIDEO_LLAVA_TEMPLATE", "make_tiny_video_llava", "video_llava_tokenizer"]

# In the manner of the published prompts, "USER: <video>\n... ASSISTANT:".
VIDEO_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tiny_video_llava(path: Path, *, layout: Layout = Layout.TODAY, **changes: Any) -> Path:
    """Write a Video-LLaVA checkpoint directory with frames of 16 patches.

    Args:
        path: Directory to create.
        layout: Names of the tensors.
        changes: `text` and `vision` (mappings) change those configs, `seed` the weights, `max_shard_size`
            the files; everything else is for `VideoLlavaConfig`.
    """
    tokenizer = video_llava_tokenizer()
    seed, shards = changes.pop("seed", 0), changes.pop("max_shard_size", "1GB")
    config = VideoLlavaConfig(
        vision_config=vision_config(**changes.pop("vision", {})),
        text_config=text_config(**changes.pop("text", {})),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        architectures=["VideoLlavaForConditionalGeneration"],
        **changes,
    )
    preprocessor = {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "size": {"shortest_edge": IMAGE_SIZE},
        "image_processor_type": "VideoLlavaImageProcessor",
    }
    return save_tiny(
        path,
        config,
        tokenizer,
        preprocessor,
        template=VIDEO_LLAVA_TEMPLATE,
        seed=seed,
        layout=layout,
        max_shard_size=shards,
    )


def video_llava_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's, with a placeholder for each kind of input."""
    return tiny_tokenizer(("<image>", "<video>"))

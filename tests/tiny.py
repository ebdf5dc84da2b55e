"""Random Qwen2.5-VL and Qwen2-VL checkpoints of odd shapes, complete enough that Hugging Face loads them.

No model is instantiated: names and shapes come from one on `meta`, values from a seeded generator scaled
so that every layer changes the hidden state, attention is not flat and answers are not one repeated token.
"""

from __future__ import annotations

import json
import math
import string
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from ep_export.families.base import Video

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "make_tiny", "mrope_section", "tiny_picture", "tiny_video"]

MODELS = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
}

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The published checkpoints' template, word for word.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = (
    "system user assistant You are a helpful What is in the this picture which digits how many are "
    "there largest smallest colour red green blue white black left right top bottom where no yes one "
    "two three four five six seven eight nine ten big small cat dog house tree car and or of on with "
    "not it describe compare first second both pictures show same different hello world count name "
    "say tell me about please"
)
_VOCAB_ROWS = 304  # more rows than tokens, as in the published checkpoints


def make_tiny(
    path: Path,
    *,
    model_type: str = "qwen2_5_vl",
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn_size: int | None = None,
    vision_depth: int = 3,
    vision_heads: int = 2,
    vision_head_dim: int = 16,
    vision_ffn_size: int | None = None,
    vision_full_blocks: Sequence[int] = (1,),
    window_size: int = 56,
    min_pixels: int = 4 * 28 * 28,
    max_pixels: int = 64 * 28 * 28,
    max_positions: int = 4096,
    vocab_size: int = _VOCAB_ROWS,
    tie_embeddings: bool = False,
    repetition_penalty: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | None = None,
    old_layout: bool = False,
) -> Path:
    """Write a checkpoint directory: config, weights, tokenizer, chat template, image processor.

    Args:
        path: Directory to create.
        model_type: "qwen2_5_vl" or "qwen2_vl".
        layers: Decoder layers.
        heads: Query heads; the hidden size is `heads * head_dim`.
        kv_heads: Key/value heads.
        head_dim: Width of a head, even.
        ffn_size: Width of the feed-forward network; twice the hidden size when None.
        vision_depth: Vision blocks.
        vision_heads: Vision heads.
        vision_head_dim: Width of a vision head, a multiple of 4.
        vision_ffn_size: Width of a vision block's feed-forward network; three times the hidden size when
            None, as always in Qwen2-VL.
        vision_full_blocks: Vision blocks with full attention; Qwen2-VL has no others.
        window_size: Side of a vision window in pixels, of Qwen2.5-VL.
        min_pixels: Smallest picture after resizing.
        max_pixels: Largest picture after resizing (784 pixels make one visual token).
        max_positions: Context length.
        vocab_size: Rows of the embedding table.
        tie_embeddings: Whether lm_head is the embedding table.
        repetition_penalty: Written to generation_config.json when given.
        seed: Of the weights.
        dtype: Of the weights.
        max_shard_size: Bytes per safetensors file; one file when None.
        old_layout: Tensor names of the published checkpoints (`model.layers.*`, `visual.*`).

    Returns:
        `path`.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(max_positions)
    tokenizer.save_pretrained(path)
    kind, model = MODELS[model_type]
    config = kind(
        text_config={
            "hidden_size": heads * head_dim,
            "intermediate_size": ffn_size or 2 * heads * head_dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": max_positions,
            "max_window_layers": layers,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": mrope_section(head_dim),
            },
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "tie_word_embeddings": tie_embeddings,
        },
        vision_config=_vision_config(
            model_type,
            vision_heads,
            vision_heads * vision_head_dim,
            vision_ffn_size,
            vision_depth,
            heads * head_dim,
            window_size,
            vision_full_blocks,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tie_embeddings,
        architectures=[model.__name__],
        dtype=dtype,
    )
    config.save_pretrained(path)
    _write_processor(path, min_pixels, max_pixels)
    _write_generation_config(path, tokenizer, repetition_penalty)
    shards = _weights(config, seed, dtype, max_shard_size)
    if old_layout:
        shards = [{_old_name(name): tensor for name, tensor in shard.items()} for shard in shards]
    _save_shards(path, shards)
    return path


def mrope_section(head_dim: int) -> list[int]:
    """A split of half a head over time, height and width, in the published 16:24:24 proportion."""
    half = head_dim // 2
    time = max(1, half // 4)
    height = (half - time) // 2
    return [time, height, half - time - height]


def tiny_video(width: int, height: int, frames: int, *, fps: float = 2.0, seed: int = 0) -> Video:
    """Frames that differ, each like `tiny_picture`."""
    shown = tuple(tiny_picture(width, height, seed=1000 * (seed + 1) + i) for i in range(frames))
    return Video(shown, fps)


def tiny_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth RGB picture with some noise and rectangles, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    noise = rng.normal(0, 25, (height, width, 3))
    for _ in range(4):
        top, left = rng.integers(0, height), rng.integers(0, width)
        smooth[top : top + max(1, height // 4), left : left + max(1, width // 4)] = rng.integers(0, 256, 3)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def _vision_config(
    model_type: str,
    heads: int,
    width: int,
    ffn_size: int | None,
    depth: int,
    out: int,
    window_size: int,
    full_blocks: Sequence[int],
) -> dict[str, object]:
    """The two families have other names for the same, and `hidden_size` for two things."""
    shared = {"depth": depth, "num_heads": heads}
    if model_type == "qwen2_vl":
        return {**shared, "embed_dim": width, "hidden_size": out, "mlp_ratio": 3}
    return {
        **shared,
        "hidden_size": width,
        "intermediate_size": ffn_size or 3 * width,
        "out_hidden_size": out,
        "window_size": window_size,
        "fullatt_block_indexes": list(full_blocks),
    }


def _tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    characters = string.ascii_letters + string.digits + "?.,!:;'\"()-+/<>|_\n"
    words = list(dict.fromkeys([*characters, *_WORDS.split(), "<unk>"]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106 - not a password
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|\d|\n|[^\sA-Za-z\d]"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[ \t\r]+"), behavior="removed"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in {"<|im_end|>", "<|endoftext|>"}],
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _write_processor(path: Path, min_pixels: int, max_pixels: int) -> None:
    # The published files still name the bounds min_pixels and max_pixels.
    preprocessor = {
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))


def _write_generation_config(
    path: Path, tokenizer: PreTrainedTokenizerFast, repetition_penalty: float | None
) -> None:
    generation = {
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        "do_sample": False,
    }
    if repetition_penalty is not None:
        generation["repetition_penalty"] = repetition_penalty
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))


def _weights(
    config: PreTrainedConfig, seed: int, dtype: torch.dtype, max_shard_size: int | None
) -> list[dict[str, torch.Tensor]]:
    with torch.device("meta"):
        model = MODELS[config.model_type][1](config)
    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, parameter in model.named_parameters():  # a tied lm_head appears once, as the embedding
        tensor = _random(name, parameter.shape, generator)
        if "embed_tokens" in name and config.tie_word_embeddings:
            tensor *= 2 / math.sqrt(parameter.shape[1])  # it is lm_head too: keeps logits to a few units
        tensor = tensor.to(dtype)
        if max_shard_size is not None and shards[-1] and used + tensor.nbytes > max_shard_size:
            shards.append({})
            used = 0
        used += tensor.nbytes
        shards[-1][name] = tensor
    return shards


def _save_shards(path: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.2 * values
    if len(shape) == 1:  # a norm
        return 1 + 0.1 * values
    if "embed_tokens" in name:
        return values
    fan_in = math.prod(shape[1:])
    # Sharper attention than 1/sqrt(fan_in) gives, and logits spread over several units.
    gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv", "lm_head")) else 1.0
    return values * gain / math.sqrt(fan_in)


def _old_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

"""Random LLaVA checkpoints small enough to run in tests, complete enough for Hugging Face to read them."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

__all__ = [
    "LLAVA_TEMPLATE",
    "MISTRAL_TEMPLATE",
    "RESOLUTIONS",
    "Layout",
    "make_tiny_llava",
    "make_tiny_llava_next",
    "save_tiny",
    "text_config",
    "tiny_tokenizer",
    "vision_config",
]

IMAGE_SIZE, PATCH_SIZE = 56, 14
RESOLUTIONS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
VOCAB_ROWS = 160  # more rows than tokens, as in the published checkpoints

# The published checkpoints' template, word for word.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Of the published Mistral checkpoint, the part that user messages take.
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{ ' [/INST]' }}{% endfor %}"
)


class Layout(Enum):
    """How the tensors of a checkpoint are named."""

    TODAY = "model.language_model.layers, model.vision_tower.encoder"
    OLD = "language_model.model.layers, vision_tower.encoder"
    PUBLISHED = "language_model.model.layers, vision_tower.vision_model.encoder"


_WORDS = "USER ASSISTANT INST What is in the picture which digits are there hello red green one two three"


def make_tiny_llava(
    path: Path,
    *,
    layout: Layout = Layout.TODAY,
    image_processor: str = "CLIPImageProcessor",
    **changes: Any,
) -> Path:
    """Write a LLaVA-1.5 checkpoint directory.

    Args:
        path: Directory to create.
        layout: Names of the tensors.
        image_processor: The class preprocessor_config.json names.
        changes: `text` and `vision` (mappings) change those configs, `seed` the weights, `max_shard_size`
            the files; everything else is for `LlavaConfig`.
    """
    tokenizer = tiny_tokenizer()
    seed, shards = changes.pop("seed", 0), changes.pop("max_shard_size", "1GB")
    config = LlavaConfig(
        vision_config=vision_config(**changes.pop("vision", {})),
        text_config=text_config(**changes.pop("text", {})),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        architectures=["LlavaForConditionalGeneration"],
        **changes,
    )
    preprocessor = {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "size": {"shortest_edge": IMAGE_SIZE},
        "image_processor_type": image_processor,
    }
    return save_tiny(
        path,
        config,
        tokenizer,
        preprocessor,
        template=LLAVA_TEMPLATE,
        seed=seed,
        layout=layout,
        max_shard_size=shards,
    )


def make_tiny_llava_next(
    path: Path, *, layout: Layout = Layout.TODAY, template: str = LLAVA_TEMPLATE, **changes: Any
) -> Path:
    """Write a LLaVA-NeXT checkpoint directory with tiles of 16 patches; see `make_tiny_llava`."""
    tokenizer = tiny_tokenizer()
    seed, shards = changes.pop("seed", 0), changes.pop("max_shard_size", "1GB")
    config = LlavaNextConfig(
        vision_config=vision_config(**changes.pop("vision", {})),
        text_config=text_config(**changes.pop("text", {})),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=RESOLUTIONS,
        architectures=["LlavaNextForConditionalGeneration"],
        **changes,
    )
    preprocessor = {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "size": {"shortest_edge": IMAGE_SIZE},
        "image_grid_pinpoints": RESOLUTIONS,
        "image_processor_type": "LlavaNextImageProcessor",
    }
    return save_tiny(
        path,
        config,
        tokenizer,
        preprocessor,
        template=template,
        seed=seed,
        layout=layout,
        max_shard_size=shards,
    )


def vision_config(**changes: Any) -> CLIPVisionConfig:
    """A CLIP tower of 16 patches."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 24,
    }
    return CLIPVisionConfig(**{**shape, **changes})


def text_config(model_type: str = "llama", **changes: Any) -> PreTrainedConfig:
    """A Llama, Mistral or Qwen2 of 4 layers."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB_ROWS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kind = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[model_type]
    if model_type != "llama":
        shape = {**shape, "num_key_value_heads": 2, "sliding_window": None}
    return kind(**{**shape, **changes})


def tiny_tokenizer(
    markup: Sequence[str] = ("<image>",), *, begin: str | None = "<s>", end: str = "</s>"
) -> PreTrainedTokenizerFast:
    """Words and letters.

    Args:
        markup: Special tokens that stand for pictures or turns.
        begin: What begins every sequence, as with Llama's; None for none, as with Qwen's.
        end: What ends an answer.
    """
    special = ["<unk>", *([begin] if begin else []), end, *markup, "<pad>"]
    characters = string.ascii_letters + string.digits + "?.,!:;'\"()-+/<>|_[]\n"
    words = list(dict.fromkeys([*special, *characters, *_WORDS.split()]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106 - not a password
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|\d|\n|[^\sA-Za-z\d]"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[ \t\r]+"), behavior="removed"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, words.index(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106
        bos_token=begin,
        eos_token=end,
        pad_token="<pad>",  # noqa: S106
        additional_special_tokens=list(markup),
        clean_up_tokenization_spaces=False,
    )


def save_tiny(
    path: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    preprocessor: dict[str, Any],
    *,
    template: str,
    seed: int,
    layout: Layout,
    max_shard_size: str = "1GB",
) -> Path:
    """Weights and config by Hugging Face's own `save_pretrained`, and the processor's files beside them."""
    model = AutoModelForImageTextToText.from_config(config)
    _fill(model, seed)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(
        path, save_original_format=layout is not Layout.TODAY, max_shard_size=max_shard_size
    )
    if layout is Layout.PUBLISHED:
        _as_published(path)
    tokenizer.save_pretrained(path)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    return path


def _as_published(path: Path) -> None:
    """Vision towers one level deeper, and a buffer of CLIP's that transformers once saved along."""
    for file in path.glob("model*.safetensors"):
        tensors = {_published_name(name): tensor for name, tensor in load_file(file).items()}
        for name in [name for name in tensors if name.endswith("class_embedding")]:
            tensors[_position_ids(name)] = torch.arange(17)[None]
        save_file(tensors, file, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    if index.is_file():
        raw = json.loads(index.read_text())
        names = {_published_name(name): file for name, file in raw["weight_map"].items()}
        for name in [name for name in names if name.endswith("class_embedding")]:
            names[_position_ids(name)] = names[name]
        index.write_text(json.dumps({**raw, "weight_map": names}))


def _published_name(name: str) -> str:
    return re.sub(r"\b(vision|image|video)_tower\.", r"\1_tower.vision_model.", name)


def _position_ids(class_embedding: str) -> str:
    return class_embedding.replace("class_embedding", "position_ids")


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Weights under which attention is not flat and logits spread over several units."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.2
        elif "norm" in name:
            values = 1 + 0.1 * values
        elif parameter.dim() > 1 and not any(part in name for part in ("position_embedding", "embed_tokens")):
            sharp = any(part in name for part in ("q_proj", "k_proj", "lm_head"))
            values *= (1.5 if sharp else 1.0) / math.sqrt(math.prod(parameter.shape[1:]))
        parameter.data.copy_(values)

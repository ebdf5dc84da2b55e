"""Llama, Mistral and Qwen2 as the language half of a vision-language model: dimensions, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ep_export.dims import DecoderDims
from ep_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["text_dims"]


def text_dims(config: PreTrainedConfig, *, model_types: Sequence[str] = ("llama", "mistral")) -> DecoderDims:
    """Dimensions of the decoder in `config.text_config`.

    Args:
        config: The whole model's config.
        model_types: The language models that the family is exported with.

    Raises:
        UserError: Another language model, sliding-window attention, or sizes that do not divide.
    """
    text = config.text_config
    _refuse_unsupported(text, model_types)
    return DecoderDims(
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        ffn_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        max_positions=text.max_position_embeddings,
        position_axes=1,
    )


def _refuse_unsupported(text: PreTrainedConfig, model_types: Sequence[str]) -> None:
    """Stop at what would change the mathematics of the decoder."""
    if text.model_type not in model_types:
        raise UserError(
            f"config has the language model {text.model_type!r}, expected {' or '.join(model_types)}",
            hint="other language models are not exported with this family",
        )
    if getattr(text, "sliding_window", None) is not None:
        raise UserError(
            f"config uses sliding-window attention of {text.sliding_window} tokens, expected full attention",
            hint="such models are not exported",
        )
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % kv_heads or (getattr(text, "head_dim", None) is None and text.hidden_size % heads):
        raise UserError(
            f"config has hidden_size {text.hidden_size}, {heads} heads and {kv_heads} kv heads, which do not "
            "divide",
            hint="check config.json",
        )

"""Where the decoder's parts sit in today's Hugging Face vision-language models: the same place in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ep_export.families.base import DecoderModules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["decoder_modules"]


def decoder_modules(model: PreTrainedModel, *, language: str = "language_model") -> DecoderModules:
    """The decoder's modules; `rotary` has real buffers even when the model is on `meta`.

    Args:
        model: The Hugging Face model.
        language: What it calls its language half.
    """
    import torch

    parts: Any = model
    text = getattr(parts.model, language)
    rotary = text.rotary_emb
    if rotary.inv_freq.is_meta:
        with torch.device("cpu"):
            rotary = type(rotary)(text.config)
    return DecoderModules(
        embed_tokens=text.embed_tokens,
        layers=tuple(text.layers),
        norm=text.norm,
        lm_head=parts.lm_head,
        rotary=rotary,
    )

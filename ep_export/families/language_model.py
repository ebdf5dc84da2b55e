"""Where the decoder's parts sit in today's Hugging Face vision-language models: the same place in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ep_export.families.base import DecoderModules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["decoder_modules"]


def decoder_modules(model: PreTrainedModel) -> DecoderModules:
    """The decoder's modules; `rotary` has real buffers even when the model is on `meta`."""
    import torch

    parts: Any = model
    language = parts.model.language_model
    rotary = language.rotary_emb
    if rotary.inv_freq.is_meta:
        with torch.device("cpu"):
            rotary = type(rotary)(language.config)
    return DecoderModules(
        embed_tokens=language.embed_tokens,
        layers=tuple(language.layers),
        norm=language.norm,
        lm_head=parts.lm_head,
        rotary=rotary,
    )

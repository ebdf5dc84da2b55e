"""Why a model of no family here is refused, in one sentence a person can act on.

Models that people ask for are listed with what in their mathematics the export does not do. Everything else
is a text model, or unknown to this build.
"""

from __future__ import annotations

from collections.abc import Sequence

from ep_export.errors import UserError, near_matches

__all__ = ["REASONS", "refusal", "refusal_by_name"]

_DEEPSTACK = "vision features are added to the output of its first decoder layers too (deepstack)"
_WINDOWS = "most of its decoder layers attend within a sliding window only"
_CROSS = "its decoder looks at pictures through cross-attention, so there are no visual tokens to prune"
_LINEAR = "most of its decoder layers are linear attention, which has no KV cache to prune"
_CODES = "pictures are token codes of its own vocabulary, not embeddings of a vision encoder"
_QUERIES = "a Q-Former turns each picture into a few learned queries, which is not exported"
_OMNI = "its vision-language half sits inside a larger model that also hears and speaks"
_REMOTE = "its code comes with the checkpoint and would have to be trusted; such code is never run"
_ORIGINAL = "it is in the original LLaVA layout; the converted checkpoint (llava-hf on the hub) is read"
_ENCODED = "it is an encoder-decoder; only decoders that read visual tokens are exported"

REASONS: dict[str, str] = {
    "aya_vision": _WINDOWS,
    "blip-2": _QUERIES,
    "chameleon": _CODES,
    "cohere2_vision": _WINDOWS,
    "emu3": _CODES,
    "florence2": _ENCODED,
    "fuyu": "it has no vision encoder: patches enter its decoder through one linear layer",
    "gemma3": _WINDOWS,
    "gemma3n": _WINDOWS,
    "idefics": _CROSS,
    "idefics2": "a perceiver resamples its pictures, which is not exported",
    "instructblip": _QUERIES,
    "internlm_xcomposer2": _REMOTE,
    "internvl_chat": _REMOTE,
    "lfm2_vl": "some of its decoder layers are short convolutions, which have no KV cache to prune",
    "llama4": "its decoder attends in chunks, and in some layers without positions",
    "llava_llama": _ORIGINAL,
    "llava_mistral": _ORIGINAL,
    "llava_qwen": _ORIGINAL,
    "minicpmv": _REMOTE,
    "mistral3": "its Pixtral vision tower is not exported",
    "mllama": _CROSS,
    "paligemma": "its decoder attends in both directions within the prompt, not causally",
    "phi3_v": _REMOTE,
    "phi4_multimodal": "pictures switch extra LoRA weights of its decoder on",
    "pix2struct": _ENCODED,
    "qwen2_5_omni": _OMNI,
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_omni_moe": _OMNI,
    "qwen3_vl": _DEEPSTACK,
    "qwen3_vl_moe": _DEEPSTACK,
    "vipllava": "it joins the features of several layers of its vision tower",
    "vision-encoder-decoder": _ENCODED,
}
"""model_type -> what stands in the way."""


def refusal(model_type: str, supported: Sequence[str]) -> UserError:
    """The error for a model type of no family.

    Args:
        model_type: From the checkpoint's config.json.
        supported: Model types of all families.
    """
    listed = f"supported: {', '.join(supported)}"
    if model_type in REASONS:
        return UserError(f"model_type {model_type!r} is not supported: {REASONS[model_type]}", hint=listed)
    if _is_text_only(model_type):
        return UserError(
            f"model_type {model_type!r} is a text-only model: it has no visual tokens to prune",
            hint=f"give a vision-language model; {listed}",
        )
    return UserError(
        f"model_type {model_type!r} is not a supported family", hint=near_matches(model_type, supported)
    )


def refusal_by_name(model: str, supported: Sequence[str]) -> UserError | None:
    """The error for an alias or hub id that says which unsupported architecture it is, without its config.

    Args:
        model: As it was typed, e.g. "Qwen/Qwen3-VL-8B-Instruct".
        supported: Model types of all families.

    Returns:
        None where its name begins with no unsupported model type, however it is punctuated, or where a
        supported one fits it better.
    """
    name = _letters(model.rpartition("/")[2])
    kind = max(
        (kind for kind in (*REASONS, *supported) if name.startswith(_letters(kind))), key=len, default=""
    )
    if kind not in REASONS:
        return None
    return UserError(
        f"{model} is of type {kind}, which is not supported: {REASONS[kind]}",
        hint="`ep-export models` lists what is",
    )


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _is_text_only(model_type: str) -> bool:
    """Whether transformers knows it as a causal language model without a part for anything else."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        return False
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return False
    kind = CONFIG_MAPPING[model_type]
    return not kind.sub_configs and not kind.is_encoder_decoder

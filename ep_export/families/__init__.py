"""The model families this build knows. Adding one is one file and one line in `FAMILIES`."""

from __future__ import annotations

from ep_export.errors import UserError
from ep_export.families.base import Family
from ep_export.families.llava import Llava
from ep_export.families.llava_next import LlavaNext
from ep_export.families.llava_onevision import LlavaOnevision
from ep_export.families.qwen2_5_vl import Qwen2_5_VL
from ep_export.families.qwen2_vl import Qwen2VL
from ep_export.families.smolvlm import SmolVLM
from ep_export.families.unsupported import refusal, refusal_by_name
from ep_export.families.video_llava import VideoLlava

__all__ = ["FAMILIES", "family_named", "family_of", "refuse_by_name"]

FAMILIES: tuple[Family, ...] = (
    Qwen2_5_VL(),
    Qwen2VL(),
    Llava(),
    LlavaNext(),
    LlavaOnevision(),
    VideoLlava(),
    SmolVLM(),
)

_MODEL_TYPES = tuple(kind for family in FAMILIES for kind in family.model_types)


def family_of(model_type: str) -> Family:
    """The family of a checkpoint's `model_type`.

    Raises:
        UserError: No family has it; says why where that is known, and names the supported ones.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise refusal(model_type, _MODEL_TYPES)


def refuse_by_name(model: str) -> None:
    """Stop at an alias or hub id of an unsupported architecture, before anything is fetched.

    Raises:
        UserError: It is one; says why.
    """
    error = refusal_by_name(model, _MODEL_TYPES)
    if error is not None:
        raise error


def family_named(name: str) -> Family:
    """The family a bundle's manifest names.

    Raises:
        UserError: This build has no such family.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(
        f"family {name!r} is unknown to this ep-export", hint=f"known: {known}; upgrade ep-export"
    )

"""The model families this build knows. Adding one is one file and one line in `FAMILIES`."""

from __future__ import annotations

from ep_export.errors import UserError
from ep_export.families.base import Family
from ep_export.families.llava import Llava
from ep_export.families.llava_next import LlavaNext
from ep_export.families.qwen2_5_vl import Qwen2_5_VL

__all__ = ["FAMILIES", "family_named", "family_of"]

FAMILIES: tuple[Family, ...] = (Qwen2_5_VL(), Llava(), LlavaNext())


def family_of(model_type: str) -> Family:
    """The family of a checkpoint's `model_type`.

    Raises:
        UserError: No family has it; names the supported ones.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise UserError(f"model_type {model_type!r} is not a supported family", hint=f"supported: {supported}")


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

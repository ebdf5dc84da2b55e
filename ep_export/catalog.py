"""What is known by name: aliases, their collapse layers with provenance, and how far each was verified."""

from __future__ import annotations

from dataclasses import dataclass

from ep_export.aliases import ALIASES, Alias
from ep_export.calibrate.choose import find_published
from ep_export.families import FAMILIES, family_named

__all__ = ["KnownFamily", "KnownModel", "known_families", "known_models"]


@dataclass(frozen=True)
class KnownModel:
    """One alias.

    Attributes:
        alias: What a person types.
        family: Name under `ep_export.families`.
        hub_id: Where the checkpoint is published.
        ecl: Its known Entropy Collapse Layer, None when nobody published one.
        provenance: "published", or "unknown": calibrate it.
        verified: What was verified of its family, and how.
        source: Where the layer was published; empty when it is unknown.
        same_as: The alias this one is a second name of.
    """

    alias: str
    family: str
    hub_id: str
    ecl: int | None
    provenance: str
    verified: str
    source: str = ""
    same_as: str | None = None


@dataclass(frozen=True)
class KnownFamily:
    """One family.

    Attributes:
        family: Its name.
        model_types: What `model_type` in a checkpoint's config.json may be.
        verified: What was verified of it, and how.
    """

    family: str
    model_types: tuple[str, ...]
    verified: str


def known_models() -> tuple[KnownModel, ...]:
    """Every alias, in the order they are registered."""
    return tuple(_known(alias) for alias in ALIASES)


def known_families() -> tuple[KnownFamily, ...]:
    """Every family, in the order they are registered."""
    return tuple(KnownFamily(family.name, family.model_types, family.verified) for family in FAMILIES)


def _known(alias: Alias) -> KnownModel:
    record = find_published(alias.name)
    return KnownModel(
        alias=alias.name,
        family=alias.family,
        hub_id=alias.hub_id,
        ecl=record.ecl if record else None,
        provenance=record.provenance.kind.value if record else "unknown",
        verified=family_named(alias.family).verified,
        source=record.provenance.source if record else "",
        same_as=alias.same_as,
    )

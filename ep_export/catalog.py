"""What is known by name: aliases, their collapse layers with provenance, and how far each was verified."""

from __future__ import annotations

from dataclasses import dataclass

from ep_export.aliases import ALIASES
from ep_export.calibrate.choose import find_published
from ep_export.families import family_named

__all__ = ["KnownModel", "known_models"]


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
    """

    alias: str
    family: str
    hub_id: str
    ecl: int | None
    provenance: str
    verified: str


def known_models() -> tuple[KnownModel, ...]:
    """Every alias, in the order families are registered."""
    return tuple(_known(alias.name, alias.family, alias.hub_id) for alias in ALIASES)


def _known(name: str, family: str, hub_id: str) -> KnownModel:
    record = find_published(name)
    return KnownModel(
        alias=name,
        family=family,
        hub_id=hub_id,
        ecl=record.ecl if record else None,
        provenance=record.provenance.kind.value if record else "unknown",
        verified=family_named(family).verified,
    )

"""`ep-export models`: what is known, and how far each was verified."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ep_export.cli.console import print_json, print_table
from ep_export.cli.options import json_option

if TYPE_CHECKING:
    from ep_export.catalog import KnownFamily, KnownModel

__all__ = ["models"]

_WIDTH = 96  # lines of running text: fits an 100-column terminal, and a pipe has no width to ask for


@click.command(short_help="List known models and what was verified of each.")
@json_option
def models(as_json: bool) -> None:
    """List the models known by alias, and what was verified of each family."""
    from ep_export.catalog import known_families, known_models

    known, families = known_models(), known_families()
    if as_json:
        print_json({"models": known, "families": families})
        return
    print_table("", ("alias", "hub id", "K", "known from"), [_row(model) for model in known])
    click.echo("\n".join(_layers(known)))
    click.echo("\nFamilies, and what was verified of each:")
    for family in families:
        click.echo("\n" + "\n".join(_family(family, known)))


def _row(model: KnownModel) -> tuple[str, str, str, str]:
    if model.same_as is not None:
        return model.alias, f"= {model.same_as}", str(model.ecl or "-"), model.provenance
    return model.alias, model.hub_id, str(model.ecl or "-"), model.provenance


def _layers(known: Sequence[KnownModel]) -> list[str]:
    """What K is, and where each published one stands."""
    lines = textwrap.wrap(
        "K is the Entropy Collapse Layer: layers from K on see the kept tokens only. Published ones were not "
        "measured here; where it is unknown, `ep-export calibrate` measures it on your pictures.",
        _WIDTH,
    )
    for model in known:
        if model.source and model.same_as is None:
            lines += _wrapped(f"{model.alias}: {model.source}", "  ", "    ")
    return lines


def _family(family: KnownFamily, known: Sequence[KnownModel]) -> list[str]:
    kinds = ", ".join(f"model_type {kind}" for kind in family.model_types if kind != family.family)
    aliases = ", ".join(model.alias for model in known if model.family == family.family)
    lines = [f"{family.family} ({kinds} too)" if kinds else family.family]
    if aliases:
        lines += _wrapped(aliases, "  ", "  ")
    return lines + _wrapped(family.verified, "    ", "    ")


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)

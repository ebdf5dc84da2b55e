"""`ep-export models`: what is known, and how far each was verified."""

from __future__ import annotations

import click

from ep_export.cli.console import print_json, print_table
from ep_export.cli.options import json_option

__all__ = ["models"]


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models known by alias."""
    from ep_export.catalog import known_models

    known = known_models()
    if as_json:
        print_json({"models": known})
        return
    rows = [(m.alias, m.family, m.hub_id, "-" if m.ecl is None else str(m.ecl), m.provenance) for m in known]
    print_table("", ("alias", "family", "hub id", "ECL", "provenance"), rows)
    for family, verified in {m.family: m.verified for m in known}.items():
        click.echo(f"{family}, verified: {verified}")

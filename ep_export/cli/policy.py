"""`ep-export policy`: the choosers of a bundle, swapped without building it again."""

from __future__ import annotations

from pathlib import Path

import click

from ep_export.bundle import Bundle, Manifest, Role
from ep_export.cli.console import note, print_json, print_table
from ep_export.cli.options import bundle_argument, json_option
from ep_export.errors import UsageError
from ep_export.spelling import parse_chooser

__all__ = ["policy"]


@click.group()
def policy() -> None:
    """Show and add the policies of a bundle: which visual tokens stay at a cut."""


@policy.command("list")
@bundle_argument
@json_option
def list_policies(bundle: Path, as_json: bool) -> None:
    """Show which policies a bundle holds, cut by cut."""
    manifest = Bundle.open(bundle, verify=False).manifest
    rows = _rows(manifest)
    if as_json:
        print_json({"policies": manifest.policies, "components": rows})
        return
    print_table(
        str(bundle),
        ("cut", "layer", "policy", "default"),
        [
            (str(row["cut"]), str(row["layer"]), str(row["policy"]), "*" if row["default"] else "")
            for row in rows
        ],
    )


@policy.command("add")
@bundle_argument
@click.option(
    "--policy", "names", multiple=True, required=True, metavar="NAME", help="Policy to add; may repeat."
)
@click.option(
    "--at", "cuts", type=click.IntRange(0), multiple=True, metavar="CUT", help="Cut to add it at [every cut]."
)
@json_option
def add(bundle: Path, names: tuple[str, ...], cuts: tuple[int, ...], as_json: bool) -> None:
    """Write further policies into a bundle. No other component changes, and no checkpoint is needed."""
    from ep_export.export.policies import add_policies

    choosers = [parse_chooser(name) for name in names]
    if len({chooser.name for chooser in choosers}) < len(choosers):
        raise UsageError("two policies have one name", hint="give each --policy once")
    written = add_policies(Bundle.open(bundle), choosers, cuts=cuts or None)
    if as_json:
        print_json({"bundle": str(bundle), "policies": written.manifest.policies})
        return
    for chooser in choosers:
        click.echo(chooser.name)
    note(f"run it: ep-export run {bundle} --policy {choosers[0].name} ...")


def _rows(manifest: Manifest) -> list[dict[str, object]]:
    return [
        {
            "cut": prune.cut,
            "layer": manifest.schedule.cuts[prune.cut].layer,
            "policy": prune.chooser.name,
            "default": prune.chooser == manifest.schedule.cuts[prune.cut].chooser,
        }
        for prune in manifest.with_role(Role.PRUNE)
        if prune.chooser is not None and prune.cut is not None
    ]

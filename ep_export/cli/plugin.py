"""`ep-export plugin build`: compile the TensorRT plugin for a platform."""

from __future__ import annotations

from pathlib import Path

import click

from ep_export.cli.console import print_json
from ep_export.cli.options import json_option

__all__ = ["plugin"]


@click.group()
def plugin() -> None:
    """The TensorRT plugin: EntropyPrune in CUDA."""


@plugin.command()
@click.option(
    "--preset",
    default="x86-64",
    show_default=True,
    help="Platform: x86-64, jetson, jetpack6, or ci (fewest GPUs).",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Build folder [build/plugin-<preset>]."
)
@json_option
def build(preset: str, out: Path | None, as_json: bool) -> None:
    """Build the plugin with CMake and nvcc; prints the library's path."""
    from ep_export.plugin import build_plugin

    library = build_plugin(preset, out or Path("build") / f"plugin-{preset}")
    if as_json:
        print_json({"library": str(library), "preset": preset})
        return
    click.echo(str(library))

"""`ep-export export`: the graphs alone, without calibration or validation."""

from __future__ import annotations

from typing import Any

import click

from ep_export.cli.build import build_request, print_bundle, show_plan
from ep_export.cli.console import progress_bar
from ep_export.cli.options import export_options, json_option, keep_options, model_option
from ep_export.cli.schedule import schedule_options

__all__ = ["export"]


@click.command()
@model_option
@keep_options(required=True)
@schedule_options
@export_options
@json_option
def export(as_json: bool, **options: Any) -> int:
    """Write a bundle without validating it."""
    from ep_export.building import build, prepare

    prepared = prepare(build_request(options))
    show_plan(prepared)
    with progress_bar() as progress:
        result = build(prepared, check=False, progress=progress)
    return print_bundle(prepared, result, check=False, as_json=as_json)

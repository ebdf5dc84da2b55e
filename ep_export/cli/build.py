"""`ep-export build`: the main job. A plan first, then a bundle that was compared with PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ep_export.bundle import Dialect, Precision, WeightsMode
from ep_export.cli.compile import compile_json, compile_request, limit_options, print_compiled
from ep_export.cli.console import note, print_json, print_table, progress_bar
from ep_export.cli.options import (
    export_options,
    json_option,
    keep_options,
    model_option,
    optional_keep,
)
from ep_export.cli.plan import keep_sentence, plan_json, plan_rows
from ep_export.cli.schedule import schedule_options, schedule_request
from ep_export.numerics import rounded_to
from ep_export.targets import find_target

if TYPE_CHECKING:
    from ep_export.building import BuildRequest, BuildResult, Prepared

__all__ = ["build", "build_request", "print_bundle", "show_plan"]

EXIT_DIFFERENT = 3


@click.command()
@model_option
@keep_options(required=True)
@schedule_options
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Your pictures: to calibrate on when no record says where to prune, and to validate on.",
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="JSON: picture name -> questions."
)
@export_options
@click.option(
    "--target",
    "target_name",
    metavar="T",
    help="Compile for this device afterwards; dialect and precision are its best unless told.",
)
@limit_options
@click.option("--force", is_flag=True, help="Compile although the estimate says that it does not fit.")
@click.option(
    "--validate/--no-validate", "check", default=True, show_default=True, help="Compare with PyTorch."
)
@json_option
def build(check: bool, target_name: str | None, force: bool, as_json: bool, **options: Any) -> int:
    """Turn a checkpoint into a pruned, validated bundle."""
    from ep_export.building import build as build_bundle
    from ep_export.building import prepare

    if target_name is None:
        request = build_request(options)
    else:
        target = find_target(target_name)
        graphs = target.best(*_told(options))
        options.update(dialect=graphs.dialect.value, precision=graphs.precision.value)
        own = {
            "out": None,
            "overwrite": False,
            "plugin": None,
            "golden": True,
        }  # of `compile`, not of `build`
        wanted = compile_request(target, {**options, **own, "force": force})
        request = replace(build_request(options), compile=wanted)
    with progress_bar() as progress:
        prepared = prepare(request, progress)
    show_plan(prepared)
    with progress_bar() as progress:
        result = build_bundle(prepared, check=check, progress=progress)
    return print_bundle(prepared, result, check=check, as_json=as_json)


def _told(options: dict[str, Any]) -> tuple[Dialect | None, Precision | None]:
    """Dialect and precision as far as the person chose them."""
    source = click.get_current_context().get_parameter_source
    told = {name for name in ("dialect", "precision") if source(name) is not ParameterSource.DEFAULT}
    return (
        Dialect(options["dialect"]) if "dialect" in told else None,
        Precision(options["precision"]) if "precision" in told else None,
    )


def build_request(options: dict[str, Any]) -> BuildRequest:
    """A typed request from the options of `build` or `export`."""
    from ep_export.building import BuildRequest

    out = options["out"] or Path(f"{Path(options['model']).name}-ep")
    return BuildRequest(
        model=options["model"],
        keep=optional_keep(options["keep"], options["keep_tokens"]),
        schedule=schedule_request(options),
        out=out,
        overwrite=options["overwrite"],
        dialect=Dialect(options["dialect"]),
        precision=Precision(options["precision"]),
        shards=WeightsMode(options["shards"]),
        weights=rounded_to(options["weights"], options["group"], options["vision_weights"]),
        degree=options["degree"],
        images=options.get("images"),
        prompts=options.get("prompts"),
    )


def show_plan(prepared: Prepared) -> None:
    """The plan and what its schedule stands on, before time is spent."""
    plan, request = prepared.plan, prepared.request
    title = f"{request.model} -> {request.out}, keep {plan.keep}"
    print_table(
        title,
        ("for one typical picture", "full", "pruned", "saved"),
        plan_rows(plan, request.precision.value),
        err=True,
    )
    note(f"kept: {keep_sentence(plan)}")
    note(f"schedule: {plan.schedule}")
    note(f"evidence: {prepared.evidence.summary} [{prepared.evidence.kind.value}]")


def print_bundle(prepared: Prepared, result: BuildResult, *, check: bool, as_json: bool) -> int:
    """The result: where it is, what was verified. Returns the exit code."""
    from ep_export.building import NO_BF16, NO_BF16_HINT

    report = result.report
    if as_json:
        from ep_export.validate import to_json

        print_json(
            {
                "bundle": str(result.bundle.path),
                "plan": plan_json(prepared.plan),
                "evidence": prepared.evidence,
                "validation": to_json(report) if report else None,
                **_compiled_json(prepared, result),
            }
        )
    else:
        if report:
            from ep_export.validate import text_lines

            for line in text_lines(report):
                note(line)
        elif check and prepared.request.precision is Precision.BF16:
            note(f"not validated: {NO_BF16}; {NO_BF16_HINT}")
        for warning in result.bundle.manifest.warnings:
            note(f"warning: {warning}")
        click.echo(str(result.bundle.path))
        if result.bundle.path != prepared.request.out:
            note(
                f"{prepared.request.out} is still the earlier bundle: the new one was found different and "
                f"lies in {result.bundle.path}"
            )
        if request := prepared.request.compile:
            if result.compiled:
                print_compiled(request.target, result.compiled)
            else:
                note(f"not compiled for {request.target.name}: the bundle was found different")
    return EXIT_DIFFERENT if report and report.verdict.value == "FAIL" else 0


def _compiled_json(prepared: Prepared, result: BuildResult) -> dict[str, Any]:
    if prepared.request.compile is None:
        return {}
    compiled = result.compiled
    return {"compiled": compile_json(prepared.request.compile.target, compiled) if compiled else None}

"""`ep-export compile`: a bundle becomes engines for a target, or a kit that makes them on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ep_export.bundle import Bundle, Precision
from ep_export.cli.console import note, print_json, print_table, progress_bar
from ep_export.cli.options import add_options, bundle_argument, json_option
from ep_export.spelling import parse_chooser
from ep_export.targets import Target, find_target

if TYPE_CHECKING:
    from ep_export.engine.compile import CompileRequest, CompileResult
    from ep_export.engine_record import EngineFile

__all__ = ["compile_json", "compile_request", "compile_verb", "limit_options", "print_compiled"]

_F = TypeVar("_F", bound=Callable[..., Any])


def limit_options(function: _F) -> _F:
    """What engines must be able to do, and what is no engine."""
    return add_options(
        function,
        click.option(
            "--max-prompt",
            type=click.IntRange(1),
            metavar="T",
            help="Longest prompt in tokens, visual ones included [a large picture and a long question].",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(1),
            metavar="T",
            help="Longest answer in tokens [256].",
        ),
        click.option(
            "--max-pixels",
            type=click.IntRange(1),
            metavar="P",
            help="Largest picture, width times height [1003520: 1280 visual tokens of Qwen2.5-VL].",
        ),
        click.option(
            "--max-kept-tokens",
            type=click.IntRange(1),
            metavar="T",
            help="Most visual tokens kept [all of a prompt's]; fewer make caches smaller and prefill "
            "shorter. TensorRT-RTX takes fewer than 3840.",
        ),
        click.option(
            "--max-batch",
            type=click.IntRange(1),
            metavar="N",
            help="Most answers a decode step continues at once, in the modern dialect [8; on Arm 1].",
        ),
        click.option(
            "--prune-on",
            type=click.Choice(["target", "cpu"]),
            help="cpu: ONNX Runtime runs the prune components, beside the engines [target].",
        ),
    )


@click.command("compile")
@bundle_argument
@click.option("--target", "name", required=True, metavar="T", help="See `ep-export targets`, or a file.toml.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="Have this policy ready too, beside those of the bundle's schedule; may repeat.",
)
@limit_options
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="[BUNDLE/engines/T]")
@click.option(
    "--overwrite", is_flag=True, help="Replace an earlier kit, and engines that would be others now."
)
@click.option("--force", is_flag=True, help="Go on although the estimate says that it does not fit.")
@click.option(
    "--plugin",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Library of the TensorRT plugin, for compiling on the device (`ep-export plugin build`).",
)
@click.option("--model", metavar="M", help="Checkpoint for a kit's golden outputs [the bundle's].")
@click.option(
    "--golden/--no-golden",
    default=True,
    show_default=True,
    help="Put PyTorch's answers into a kit, to compare with on the device; loads the model.",
)
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compute every checksum before use."
)
@json_option
def compile_verb(bundle: Path, name: str, verify: bool, as_json: bool, **options: Any) -> None:
    """Compile a bundle: engines, or a kit for the device.

    TensorRT-RTX targets compile here, without a GPU. TensorRT targets compile where their GPU is;
    elsewhere this writes a kit: two commands on the device compile it and compare it with PyTorch.

    Run again, it compiles what is missing: after `ep-export policy add`, that policy's small engine.
    """
    from ep_export.engine.compile import compile_bundle

    target = find_target(name)
    opened = Bundle.open(bundle, verify=verify)
    with progress_bar() as progress:
        result = compile_bundle(opened, compile_request(target, options), progress)
    if as_json:
        print_json(compile_json(target, result))
    else:
        print_compiled(target, result)
        if result.directory:
            _advise(target, opened.manifest.precision)
        if result.directory:
            click.echo(str(result.directory))


def compile_request(target: Target, options: dict[str, Any]) -> CompileRequest:
    """A typed request from the options of the verb, or from those of `build`."""
    from ep_export.engine.compile import CompileRequest
    from ep_export.engine.placement import PruneOn
    from ep_export.engine.profiles import LimitsRequest

    prune_on = options["prune_on"]
    return CompileRequest(
        target,
        LimitsRequest(**{field.name: options[field.name] for field in fields(LimitsRequest)}),
        policies=tuple(parse_chooser(name).name for name in options.get("policies", ())),
        prune_on=PruneOn(prune_on) if prune_on else None,
        out=options["out"],
        overwrite=options["overwrite"],
        force=options["force"],
        plugin=options["plugin"],
        model=options["model"],
        golden=options["golden"],
    )


def compile_json(target: Target, result: CompileResult) -> dict[str, Any]:
    """The result for scripts."""
    return {
        "target": target.name,
        "made": result.output,
        "directory": None if result.directory is None else str(result.directory),
        "reason": result.reason or None,
        "limits": result.limits,
        "estimate": result.estimate,
        "record": result.record,
        "reused": result.reused,
    }


def print_compiled(target: Target, result: CompileResult) -> None:
    """What compiling left, on stderr."""
    if result.directory is None:
        note(f"nothing to compile for {target.name}: {result.reason}")
        return
    if result.record:
        rows = [
            _engine_row(name, engine, reused=name in result.reused)
            for name, engine in result.record.components.items()
        ]
        rows += [(name, "-", "-", "ONNX Runtime, on the CPU") for name in result.record.on_cpu]
        title = f"{target.name}: SM {result.record.sm}, {target.flavour.value} {result.record.version}"
        print_table(title, ("engine", "size", "compiled in", "profiles"), rows, err=True)
        note(f"not run here; {_limits(result)}")
    else:
        note(f"a kit, because {result.reason}")
        note(f"copy it to the device and follow its README.md; {_limits(result)}")


def _advise(target: Target, precision: Precision) -> None:
    """A bundle is fp32 unless told, which is for a CPU: say so before somebody measures it on a GPU."""
    best = target.best()
    if precision is Precision.FP32 and best.precision is not Precision.FP32:
        note(
            f"the graphs are fp32, twice the bytes of {best.precision.value}: "
            f"`ep-export build --target {target.name}` chooses {best}"
        )


def _engine_row(name: str, engine: EngineFile, *, reused: bool) -> tuple[str, ...]:
    profiles = ", ".join(profile.name for profile in engine.profiles)
    time = "was there" if reused else f"{engine.build_seconds:.1f} s"
    return name, f"{engine.bytes / 1e6:.1f} MB", time, profiles


def _limits(result: CompileResult) -> str:
    limits = result.limits
    if limits is None:
        return ""
    return (
        f"prompts up to {limits.max_prompt} tokens, answers up to {limits.max_new_tokens}, "
        f"pictures up to {limits.max_pixels} pixels, up to {limits.max_kept_tokens} visual tokens kept, "
        f"up to {limits.max_batch} at once"
    )

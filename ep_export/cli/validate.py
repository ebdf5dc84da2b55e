"""`ep-export validate`: does the bundle compute what the pruned PyTorch model does? Exit 3 when not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ep_export.cli.build import EXIT_DIFFERENT
from ep_export.cli.console import note, print_json, printable, progress_bar
from ep_export.cli.options import bundle_argument, json_option, policies_option
from ep_export.errors import UsageError, UserError

if TYPE_CHECKING:
    from ep_export.bundle import Bundle
    from ep_export.runtime import RunnerFactory

__all__ = ["validate"]

_POLYGRAPHY_PICTURES = 2  # every tensor of every run is kept: caches of a 7B model are 100 MB a prompt


@click.command()
@bundle_argument
@click.option(
    "--model", metavar="M", help="The checkpoint to compare with [the one the bundle was built from]."
)
@click.option(
    "--images", type=click.Path(path_type=Path), metavar="DIR", help="Folder of pictures [test cards]."
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="JSON: picture name -> questions."
)
@click.option(
    "--max-pictures", type=click.IntRange(1), metavar="N", help="Pictures compared [8; with --polygraphy 2]."
)
@policies_option
@click.option("--max-new-tokens", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="DIR", help="Write the report here [BUNDLE/report]."
)
@click.option(
    "--polygraphy",
    is_flag=True,
    help="Instead of whole answers compare each component alone, in PyTorch and ONNX Runtime, with NVIDIA's "
    "Polygraphy, and write what its own commands read.",
)
@click.option(
    "--bisect", is_flag=True, help="With --polygraphy: name the first tensor that leaves its tolerance."
)
@click.option(
    "--target", metavar="T", help="With --polygraphy: compare the bundle's TensorRT engines for T as well."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With --polygraphy: write its files here [./<bundle>-polygraphy].",
)
@json_option
def validate(
    bundle: Path,
    model: str | None,
    images: Path | None,
    prompts: Path | None,
    max_pictures: int | None,
    policies: Sequence[str],
    max_new_tokens: int,
    report: Path | None,
    polygraphy: bool,
    bisect: bool,
    target: str | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Compare a bundle with the pruned PyTorch model."""
    if polygraphy and report:
        raise UsageError("--report is for whole answers; --polygraphy writes to --out", hint="give --out DIR")
    if polygraphy:
        return _with_polygraphy(
            bundle,
            model=model,
            images=images,
            prompts=prompts,
            policies=policies,
            max_pictures=max_pictures or _POLYGRAPHY_PICTURES,
            find_first=bisect,
            target=target,
            out=out or Path(f"{bundle.resolve().name}-polygraphy"),
            as_json=as_json,
        )
    if bisect or target or out:
        raise UsageError(
            "--bisect, --target and --out go with --polygraphy, which is not given", hint="add --polygraphy"
        )
    from ep_export.building import MAX_PICTURES, validate_bundle
    from ep_export.bundle import Bundle
    from ep_export.checkpoint import open_origin
    from ep_export.validate import text_lines, to_json

    opened = Bundle.open(bundle)
    checkpoint = open_origin(opened, model)
    with progress_bar() as progress:
        outcome = validate_bundle(
            opened,
            checkpoint,
            images=images,
            prompts=prompts,
            policies=policies,
            max_pictures=max_pictures or MAX_PICTURES,
            max_new_tokens=max_new_tokens,
            out=report,
            progress=progress,
        )
    if as_json:
        print_json(to_json(outcome))
    else:
        for line in text_lines(outcome):
            click.echo(printable(line))
    note(f"report: {(report or bundle / 'report') / 'report.html'}")
    return EXIT_DIFFERENT if outcome.verdict.value == "FAIL" else 0


def _with_polygraphy(
    bundle: Path,
    *,
    model: str | None,
    images: Path | None,
    prompts: Path | None,
    policies: Sequence[str],
    max_pictures: int,
    find_first: bool,
    target: str | None,
    out: Path,
    as_json: bool,
) -> int:
    from ep_export.building import pictures_and_questions
    from ep_export.bundle import Bundle
    from ep_export.checkpoint import open_origin
    from ep_export.validate.polygraphy_run import compare_with_polygraphy, polygraphy_json, polygraphy_lines

    opened = Bundle.open(bundle)
    backends = _backends(opened, target)
    checkpoint = open_origin(opened, model)
    pictures, questions = pictures_and_questions(images, prompts, max_pictures)
    with progress_bar() as progress:
        outcome = compare_with_polygraphy(
            opened,
            checkpoint,
            backends,
            pictures=pictures,
            prompts=questions,
            policies=policies,
            out=out,
            find_first=find_first,
            progress=progress,
        )
    if as_json:
        print_json(polygraphy_json(outcome))
    else:
        for line in polygraphy_lines(outcome):
            click.echo(printable(line))
    note(f"inputs, outputs and report: {out}")
    last = opened.manifest.spans[-1].name
    note(f"look closer: polygraphy inspect data {out}/{last}.outputs.json --show-values")
    return EXIT_DIFFERENT if outcome.report.verdict.value == "FAIL" else 0


def _backends(bundle: Bundle, target: str | None) -> dict[str, RunnerFactory]:
    """ONNX Runtime where it can compute the bundle, and TensorRT where engines are asked for."""
    from ep_export.building import NO_BF16, NO_BF16_HINT
    from ep_export.bundle import Precision
    from ep_export.runtime import OnnxRuntimeRunner
    from ep_export.runtime.engines import EngineBackend

    backends: dict[str, RunnerFactory] = {}
    if bundle.manifest.precision is not Precision.BF16:
        backends["onnxruntime"] = OnnxRuntimeRunner
    if target is not None:
        backends["tensorrt"] = EngineBackend(bundle, target)
    if not backends:
        raise UserError(
            f"bundle {bundle.path} cannot be run here: {NO_BF16}",
            hint=f"give --target T on the machine of its engines, or {NO_BF16_HINT}",
        )
    return backends

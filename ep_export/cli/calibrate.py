"""`ep-export calibrate`: where does this model's visual information collapse, and which policy holds?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ep_export.cli.console import note, print_json, print_table, progress_bar
from ep_export.cli.options import (
    executor_from,
    executor_options,
    json_option,
    keep_options,
    model_option,
    optional_keep,
    weights_options,
)
from ep_export.errors import UsageError
from ep_export.numerics import rounded_to
from ep_export.policy import Chooser, Nothing
from ep_export.spelling import parse_chooser

if TYPE_CHECKING:
    from ep_export.calibrate import Record
    from ep_export.checkpoint import Checkpoint

__all__ = ["calibrate"]

_MOST_ROWS = 25
"""Of the table on the terminal."""


@click.command()
@model_option
@click.option(
    "--images", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of pictures."
)
@keep_options(required=True)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="JSON: picture name -> questions."
)
@click.option("--layers", metavar="K,K,...", help="Measure only these layers [all that the keep allows].")
@click.option(
    "--also",
    multiple=True,
    metavar="NAME",
    help="Race this policy as well, e.g. norm-highest-attention (FastV); may repeat.",
)
@click.option(
    "--max-images", type=click.IntRange(1), metavar="N", help="Measure a random sample of N pictures."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the random floor and the resampling."
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where torch runs, e.g. cuda; auto spreads the model over all GPUs.",
)
@weights_options
@executor_options
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Record to write [./<model>.json]."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing record.")
@json_option
def calibrate(
    model: str,
    images: Path,
    keep: float | None,
    keep_tokens: int | None,
    prompts: Path | None,
    layers: str | None,
    also: tuple[str, ...],
    max_images: int | None,
    seed: int,
    device: str,
    weights: str,
    group: int,
    vision_weights: str,
    jobs: int | None,
    ray: str | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure on pictures where and how to prune a model.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    from ep_export.calibrate import calibrate as measure
    from ep_export.checkpoint import open_checkpoint
    from ep_export.measure.prompts import GENERIC_QUESTIONS, read_asked

    wanted = optional_keep(keep, keep_tokens)
    if wanted is None:
        raise UsageError("how much to keep is not given", hint="add --keep 0.25, or --keep-tokens N")
    plain = Path(f"{Path(model).name}.json")
    stored = rounded_to(weights, group, vision_weights)
    file = out or (plain.with_stem(f"{plain.stem}-{weights}") if stored else plain)
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists already", hint="give another --out, or --overwrite to replace it")
    checkpoint = open_checkpoint(model)
    with progress_bar() as progress:
        record = measure(
            checkpoint,
            images,
            keep=wanted,
            prompts=read_asked(prompts) if prompts else GENERIC_QUESTIONS,
            layers=_layers(layers),
            also=_also(also),
            max_images=max_images,
            seed=seed,
            device=device,
            executor=executor_from(jobs, ray),
            weights=stored,
            out=file,
            progress=progress,
            announce=note,
        )
    if as_json:
        print_json(record)
    else:
        show_record(record)
        click.echo(str(file))
    if stored and (full := _of_full_weights(checkpoint, plain, file)):
        note(_compared(record, full))
    note(f"plot: {file.with_suffix('.png')}")


def _of_full_weights(checkpoint: Checkpoint, plain: Path, file: Path) -> Record | None:
    """The record of the same model unquantised: one that lies beside, or in the working directory."""
    from ep_export.calibrate import read_calibration

    for other in (file.with_name(plain.name), plain):
        if other.is_file():
            record = read_calibration(other)
            if record.fingerprint == checkpoint.fingerprint and record.weights is None:
                return record
    return None


def _compared(record: Record, full: Record) -> str:
    """Whether rounding the weights changes what is recommended."""
    kind = record.weights.kind.value if record.weights else ""
    if record.keep != full.keep:
        return f"the record of full weights is for keep {full.keep}: not compared"
    if record.recommended == full.recommended:
        return f"with full weights the same schedule is recommended: {kind} weights do not change it"
    return f"with full weights another schedule is recommended: {full.recommended or 'none'}"


def show_record(record: Record) -> None:
    """The curves and the policy table, best first."""
    curves = [record.query_entropy, record.key_entropy, *(curve.values for curve in record.metrics)]
    rows = [
        (str(i), *(f"{value:.3g}" for value in values), "<- collapse" if i == record.ecl else "")
        for i, values in enumerate(zip(*curves, strict=True))
    ]
    header = ("layer", "queries", "keys", *(curve.metric for curve in record.metrics), "")
    print_table(f"by layer over {record.images} pictures (entropies in nats)", header, rows)
    ranked = [
        (c.name, f"{c.kl:.4f}", f"{c.top1_agreement:.1%}", str(c.images or record.images))
        for c in sorted(record.candidates, key=lambda c: (-(c.images or record.images), c.kl))[:_MOST_ROWS]
    ]
    title = "fidelity to the unpruned model, best first"
    if len(record.candidates) > _MOST_ROWS:
        title += f" ({_MOST_ROWS} of {len(record.candidates)}, the record has all)"
    print_table(title, ("policy at layer", "KL", "top-1", "pictures"), ranked)
    click.echo(f"collapse: {record.collapse_finding}; {record.detectors}")
    if record.horizon is not None:
        click.echo(f"horizon: {record.horizon.finding}")
    for one in record.horizons:
        click.echo(f"  {one.kind}: {one.finding}")
    click.echo(f"recommended: {record.recommendation}")
    if record.adaptive is not None and record.adaptive.threshold is not None:
        own = record.adaptive.threshold
        click.echo(
            f"keep {record.adaptive}: every picture keeps what scores {own.value:.4g} or better by "
            f"{own.policy} at layer {own.layer}, {own.floor:.0%} to {own.ceiling:.0%} over all layers"
        )
    for skipped in record.skipped:
        note(f"skipped: {skipped}")


def _also(names: Sequence[str]) -> list[Chooser]:
    choosers = [parse_chooser(name) for name in names]
    if Nothing() in choosers:
        raise UsageError(
            "--also nothing keeps no token whatever the keep",
            hint="leave it out: dropping everything is raced as a second cut",
        )
    return choosers


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--layers {text!r} is not a list of numbers", hint="write it as --layers 1,2,3"
        ) from error

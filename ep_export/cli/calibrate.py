"""`ep-export calibrate`: where does this model's visual information collapse, and which policy holds?"""

from __future__ import annotations

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
)
from ep_export.errors import UsageError

if TYPE_CHECKING:
    from ep_export.calibrate import Record

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
    "--max-images", type=click.IntRange(1), metavar="N", help="Measure a random sample of N pictures."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the random floor and the resampling."
)
@click.option("--device", default="cpu", show_default=True, help="Where torch runs, e.g. cuda.")
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
    max_images: int | None,
    seed: int,
    device: str,
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
    file = out or Path(f"{Path(model).name}.json")
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
            max_images=max_images,
            seed=seed,
            device=device,
            executor=executor_from(jobs, ray),
            out=file,
            progress=progress,
            announce=note,
        )
    if as_json:
        print_json(record)
    else:
        show_record(record)
        click.echo(str(file))
    note(f"plot: {file.with_suffix('.png')}")


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
    for skipped in record.skipped:
        note(f"skipped: {skipped}")


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--layers {text!r} is not a list of numbers", hint="write it as --layers 1,2,3"
        ) from error

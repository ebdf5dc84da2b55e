"""`ep-export calibrate`: where does this model's visual information collapse, and which policy holds?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ep_export.cli.console import note, print_json, print_table, progress_bar
from ep_export.cli.options import json_option, keep_options, model_option, optional_keep
from ep_export.errors import UsageError

if TYPE_CHECKING:
    from ep_export.calibrate import Record

__all__ = ["calibrate"]


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
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes; each holds the model."
)
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
    jobs: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure on pictures where and how to prune a model.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    from ep_export.calibrate import calibrate as measure
    from ep_export.checkpoint import open_checkpoint
    from ep_export.measure.prompts import GENERIC_QUESTIONS, read_questions

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
            prompts=read_questions(prompts) if prompts else GENERIC_QUESTIONS,
            layers=_layers(layers),
            max_images=max_images,
            seed=seed,
            device=device,
            jobs=jobs,
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
    rows = [
        (str(i), f"{query:.3f}", f"{key:.3f}", "<- collapse" if i == record.ecl else "")
        for i, (query, key) in enumerate(zip(record.query_entropy, record.key_entropy, strict=True))
    ]
    print_table(
        f"layer entropy in nats over {record.images} pictures", ("layer", "queries", "keys", ""), rows
    )
    ranked = [
        (str(c.layer), c.policy, f"{c.kl:.4f}", f"{c.top1_agreement:.1%}")
        for c in sorted(record.candidates, key=lambda c: c.kl)
    ]
    print_table("fidelity to the unpruned model, best first", ("K", "policy", "KL", "top-1"), ranked)
    click.echo(record.collapse_finding)
    click.echo(record.recommendation)
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

"""`ep-export sweep`: what does pruning cost and save on this model, against the alternatives?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ep_export.cli.console import note, print_json, print_table, progress_bar
from ep_export.cli.options import (
    WEIGHTS,
    executor_from,
    executor_options,
    group_option,
    model_option,
)
from ep_export.errors import UsageError
from ep_export.numerics import rounded_to
from ep_export.planning import average_keep
from ep_export.spelling import parse_cut

if TYPE_CHECKING:
    from ep_export.policy import Schedule
    from ep_export.sweep.recommended import Calibration

__all__ = ["sweep"]


def _list_methods(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    """Print the methods and leave: nothing else is needed for that."""
    if not wanted:
        return
    from ep_export.methods import METHODS

    rows = [(method.key, method.title, method.idea, method.source) for method in METHODS]
    if context.params.get("as_json"):
        names = ("name", "title", "idea", "source")
        print_json({"methods": [dict(zip(names, row, strict=True)) for row in rows]})
        context.exit()
    print_table("", ("name", "method", "what it does", "source"), rows)
    context.exit()


# As `options.json_option`, but read before --list-methods prints, in whatever order they are given.
_json_first = click.option(
    "--json", "as_json", is_flag=True, is_eager=True, help="Print one JSON object on stdout."
)


@click.command(short_help="Compare ways of pruning on your pictures.")
@click.option(
    "--list-methods",
    is_flag=True,
    expose_value=False,
    callback=_list_methods,
    help="Print what can be compared, and exit.",
)
@model_option
@click.option(
    "--images", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of pictures."
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSON: picture name -> {"question", "answer"}, or questions without answers [general questions].',
)
@click.option(
    "--keep",
    "keeps",
    type=float,
    multiple=True,
    metavar="R",
    help="Share of the visual tokens to keep, averaged over all layers; may repeat [what --cut comes to].",
)
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    metavar="K",
    help="Prune after layer K-1; may repeat [up to 3].",
)
@click.option(
    "--cut",
    "cuts",
    multiple=True,
    metavar="LAYER:SHARE[:NAME]",
    help="Compare a schedule besides: prune at LAYER to SHARE of the visual tokens, by policy NAME; may "
    "repeat. At another --keep its shares are scaled.",
)
@click.option(
    "--methods",
    metavar="NAME,NAME,...",
    help="Compare only these: of --list-methods, or any policy [all that are listed].",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    multiple=True,
    help="Measure everything with the decoder's linear layers in fewer bits as well; may repeat. Full "
    "weights (none) always are. Rounded by --calibration-images, else to the nearest.",
)
@group_option
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Draws of random tokens.")
@click.option(
    "--calibration",
    "records",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Compare the policy this record recommends; may repeat, one a keep.",
)
@click.option(
    "--calibration-images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Calibrate on these pictures first, and compare what that recommends.",
)
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Questions about them, as for `calibrate`.",
)
@click.option(
    "--max-questions", type=click.IntRange(1), metavar="N", help="Ask a random sample of N questions."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    metavar="N",
    help="Scale pictures with more pixels down first, whatever prunes them then.",
)
@click.option(
    "--timed-prompts",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Prompts whose prefill is timed; 0 times nothing.",
)
@executor_options
@click.option("--seed", type=int, default=0, show_default=True, help="Of every random choice.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where torch runs, e.g. cuda; auto spreads the model over all GPUs.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Directory to write [./<model>-sweep]."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier sweep.")
@_json_first
def sweep(**options: Any) -> None:
    """Compare ways of pruning a model: answers, FLOPs, cache and time.

    With answers in --prompts, accuracy is counted; without, agreement with the unpruned model's own answers.
    An interrupted sweep goes on where it stopped when the same command is given again.
    """
    from ep_export.checkpoint import open_checkpoint
    from ep_export.measure.prompts import read_prompts
    from ep_export.sweep import SweepOptions
    from ep_export.sweep import sweep as run
    from ep_export.sweep.report import REPORT_FILE

    out = options["out"] or Path(f"{Path(options['model']).name}-sweep")
    schedule = _schedule(options["cuts"])
    methods, calibration = _methods(options["methods"]), _calibration(options)
    prompts = read_prompts(options["prompts"]) if options["prompts"] else None
    checkpoint = open_checkpoint(options["model"])
    settings = SweepOptions(
        keeps=_keeps(options["keeps"], schedule, checkpoint.dims.layers),
        layers=tuple(sorted(set(options["layers"]))) or None,
        schedule=schedule,
        weights=tuple(w for kind in options["weights"] if (w := rounded_to(kind, options["group"]))),
        seeds=options["seeds"],
        calibration=calibration,
        max_questions=options["max_questions"],
        max_pixels=options["max_pixels"],
        timed_prompts=options["timed_prompts"],
        seed=options["seed"],
        device=options["device"],
        executor=executor_from(options["jobs"], options["ray"]),
        **methods,
    )
    with progress_bar() as progress:
        record = run(
            checkpoint,
            options["images"],
            prompts,
            out=out,
            options=settings,
            overwrite=options["overwrite"],
            progress=progress,
            announce=note,
        )
    if options["as_json"]:
        print_json(record)
    else:
        from ep_export.cli.sweep_table import show_sweep

        show_sweep(record)
        click.echo(str(out))
    note(f"report: {out / REPORT_FILE}")


def _schedule(texts: Sequence[str]) -> Schedule | None:
    from ep_export.policy import Schedule

    return Schedule(tuple(parse_cut(text) for text in texts)) if texts else None


def _keeps(given: Sequence[float], schedule: Schedule | None, layers: int) -> tuple[float, ...]:
    """Different keeps, the largest first; without any what the cuts come to."""
    if given:
        return tuple(dict.fromkeys(sorted(given, reverse=True)))
    if schedule is None:
        raise UsageError("how much to keep is not given", hint="add --keep 0.25, or --cut LAYER:SHARE")
    keep = average_keep(schedule, layers=layers)
    return () if keep.ratio is None else (keep.ratio,)


def _methods(text: str | None) -> dict[str, Any]:
    from ep_export.methods import find_methods

    if text is None:
        return {}
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError("--methods names no method", hint="see --list-methods")
    return {"methods": find_methods(names)}


def _calibration(options: dict[str, Any]) -> Calibration | None:
    from ep_export.measure.prompts import GENERIC_QUESTIONS, read_questions
    from ep_export.sweep.recommended import Calibration

    images, prompts = options["calibration_images"], options["calibration_prompts"]
    if prompts is not None and images is None:
        raise UsageError(
            "--calibration-prompts is given without pictures", hint="add --calibration-images DIR"
        )
    if not options["records"] and images is None:
        return None
    return Calibration(
        records=options["records"],
        images=images,
        prompts=read_questions(prompts) if prompts else GENERIC_QUESTIONS,
    )

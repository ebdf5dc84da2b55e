"""Options that say where and how to prune, and what they mean together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ep_export.cli.options import add_options, values
from ep_export.errors import UsageError
from ep_export.policy import Budget, Chooser, Scorer, Select, Source, TopK
from ep_export.spelling import parse_chooser, parse_cut

if TYPE_CHECKING:
    from ep_export.calibrate.choose import ScheduleRequest

__all__ = ["AUTO", "schedule_options", "schedule_request"]

AUTO = "auto"
_WITH_SYSTEM = ("--policy", "--calibration")  # a record warns of cuts before the measured horizon
HORIZON = "horizon"
"""The Information Horizon's published system (arXiv 2512.07580); see `ep_export.methods.stages`."""
_F = TypeVar("_F", bound=Callable[..., Any])


def schedule_options(function: _F) -> _F:
    """Where and how to prune, and the evidence for it."""
    return add_options(
        function,
        click.option(
            "--layer", type=int, metavar="K", help="Prune after layer K-1 instead of asking the evidence."
        ),
        click.option(
            "--policy",
            "policy_name",
            default=AUTO,
            show_default=True,
            metavar="NAME",
            help="Which tokens stay: paper, released, order2 or norm, with -highest or -lowest; "
            "coverage- and these; divprune; random; nothing; horizon (DivPrune first, random tokens deep "
            "in the model). auto: what the record or the calibration recommends.",
        ),
        click.option(
            "--cut",
            "cuts",
            multiple=True,
            metavar="LAYER:SHARE[:NAME]",
            help="Prune at LAYER to SHARE of the prompt's visual tokens, by policy NAME; may repeat, in "
            "place of --layer and --policy.",
        ),
        click.option("--select", type=values(Select), help="Which end of the scores is kept [highest]."),
        click.option(
            "--source",
            type=values(Source),
            help="States of layer K-1 that are scored [query]; attention goes with --policy norm (FastV).",
        ),
        click.option(
            "--budget",
            type=values(Budget),
            default=Budget.JOINT.value,
            show_default=True,
            help="Several pictures share one budget, or each keeps its share.",
        ),
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A record made by `ep-export calibrate`.",
        ),
    )


def schedule_request(options: Mapping[str, Any]) -> ScheduleRequest:
    """What `schedule_options` collected, typed.

    Raises:
        UsageError: A cut or a policy that cannot be read, or options that exclude each other.
    """
    from ep_export.calibrate.choose import ScheduleRequest

    budget = Budget(options["budget"])
    cuts = tuple(parse_cut(text) for text in options["cuts"])
    one_cut = {
        "--layer": options["layer"] is not None,
        "--policy": options["policy_name"] != AUTO,
        "--select": options["select"] is not None,
        "--source": options["source"] is not None,
        "--budget": budget is not Budget.JOINT,
    }
    if cuts and any(one_cut.values()):
        given = next(flag for flag, there in one_cut.items() if there)
        raise UsageError(
            f"--cut and {given} exclude each other",
            hint="say it in the cut: --cut LAYER:SHARE:NAME, e.g. 2:0.25:norm-lowest-per-picture",
        )
    if options["policy_name"] == HORIZON:
        others = [flag for flag, there in one_cut.items() if there and flag not in _WITH_SYSTEM]
        if others:
            raise UsageError(
                f"--policy {HORIZON} has cuts of its own, so that {others[0]} says nothing",
                hint=f"leave out {others[0]}, or say it in cuts: --cut 0:0.5:divprune --cut 20:0.07:random",
            )
        return ScheduleRequest(system=HORIZON, calibration=options["calibration"])
    return ScheduleRequest(
        cuts=cuts or None,
        layer=options["layer"],
        chooser=_chooser(options["policy_name"], options["select"], options["source"], budget),
        budget=budget,
        calibration=options["calibration"],
    )


def _chooser(name: str, select: str | None, source: str | None, budget: Budget) -> Chooser | None:
    """From the options of a single cut; None where they leave it to the evidence."""
    if name == AUTO and select is None and source is None:
        return None
    scorer = Scorer.PAPER.value if name == AUTO else name
    if scorer in set(Scorer):
        return TopK(Scorer(scorer), Select(select or Select.HIGHEST), Source(source or Source.QUERY), budget)
    chooser = parse_chooser(name)
    if select is not None or source is not None:
        raise UsageError(
            f"--policy {name} says it all; --select and --source go with a score's name alone",
            hint="e.g. --policy norm --select lowest, or --policy norm-lowest",
        )
    if budget is Budget.PER_PICTURE:
        if not isinstance(chooser, TopK):
            raise UsageError(f"--policy {name} has no budget per picture", hint="leave out --budget")
        chooser = replace(chooser, budget=budget)
    return chooser

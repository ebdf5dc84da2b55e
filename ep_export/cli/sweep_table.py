"""A sweep's record as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from ep_export.cli.console import note, print_table
from ep_export.policy import ADAPTIVE
from ep_export.sweep.findings import rounding_cost
from ep_export.sweep.record import (
    RANDOM,
    RECOMMENDED,
    SCHEDULE,
    Recommended,
    Row,
    SameBudget,
    SweepRecord,
)

__all__ = ["show_sweep"]

_ALWAYS = frozenset({RANDOM, RECOMMENDED, ADAPTIVE, SCHEDULE})

_TABLES = {
    SameBudget.AVERAGE: "decoder GFLOP",
    SameBudget.FIRST_TOKEN: "first-token GFLOP",
}


def show_sweep(record: SweepRecord) -> None:
    """A table a keep, best first, and what is not in it."""
    warnings, notes = (record.notes[:1], record.notes[1:]) if record.scarce else ((), record.notes)
    for text in warnings:
        click.echo(text)
    full = record.unpruned
    said = f", {full.accuracy} right" if full.accuracy else ""
    time = f", {full.prefill_ms:.0f} ms prefill" if full.prefill_ms is not None else ""
    click.echo(
        f"unpruned: {full.visual_tokens:.0f} visual tokens, {full.flops / 1e9:.3g} GFLOP{time}{said} "
        f"({record.dataset.questions} questions)"
    )
    for rounded in record.rounded:
        click.echo(rounding_cost(rounded))
    titles = {method.key: method.title for method in record.methods}
    for keep in record.keeps:
        for budget, title in _TABLES.items():
            rows = [row for row in record.rows if row.keep == keep and row.belongs(budget)]
            best, more = _Best.of(rows), ""
            if budget is SameBudget.FIRST_TOKEN:
                if all(row.budget is not budget for row in rows):
                    continue  # nothing is scaled down: it would be the first table again
                rows = [row for row in rows if row.tied or not row.cuts or row.method in _ALWAYS]
                more = "; the best rows, their floor and the smaller picture alone"
            rows.sort(key=lambda row: (-row.measure.value, row.kl.value))
            right = ["right"] if record.dataset.answers else []
            header = ("method", "K", "tokens", *right, "top-1", "KL", "over random", title, "prefill")
            print_table(
                f"keep {keep:g}, equal {budget.words}; * best in its column, = a tie with the best{more}",
                header,
                [_cells(row, titles[row.method], best, budget) for row in rows],
            )
    for one in record.recommended:
        click.echo(
            f"recommended for keep {one.keep:g}: {one.schedule or 'nothing'} ({one.reason}){_regret(one)}"
        )
    click.echo(record.entropies.finding)
    for text in notes:
        note(text)
    for skipped in record.dataset.skipped:
        note(f"left out: {skipped.name}: {skipped.reason}")


def _regret(one: Recommended) -> str:
    """What the recommendation lost against the best policy, now that the questions are known."""
    if one.regret_accuracy is not None:
        lost = one.regret_accuracy
        points = f"{lost.value * 100:.1f} [{lost.low * 100:.1f}, {lost.high * 100:.1f}] points of accuracy"
        return f"; in hindsight another policy has {points} more" if lost.value > 0 else "; none was better"
    if one.regret_kl is None:
        return ""
    return f"; in hindsight the best policy has KL {one.regret_kl.value:.3g} less"


@dataclass(frozen=True)
class _Best:
    """The best figure of every column of a table, which is marked there."""

    accuracy: float
    agreement: float
    kl: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Best:
        return cls(
            max((row.accuracy.value for row in rows if row.accuracy), default=0.0),
            max(row.agreement.value for row in rows),
            min(row.kl.value for row in rows),
        )


def _cells(row: Row, title: str, best: _Best, budget: SameBudget) -> tuple[str, ...]:
    tie = " =" if row.tied else ""
    tokens = "+".join(f"{count:.0f}" for count in row.kept_tokens)
    cells = [title, "+".join(str(cut.layer) for cut in row.cuts) or "-", tokens]
    if row.accuracy is not None:
        cells.append(f"{row.accuracy}{_star(row.accuracy.value, best.accuracy)}{tie}")
        tie = ""
    cells.append(f"{row.agreement.value:.1%}{_star(row.agreement.value, best.agreement)}{tie}")
    cells += [f"{row.kl.value:.4f}{_star(row.kl.value, best.kl)}", _over_random(row)]
    flops = row.first_token_flops if budget is SameBudget.FIRST_TOKEN else row.flops
    return (*cells, f"{flops / 1e9:.3g}", f"{row.prefill.speedup:.2f}x" if row.prefill else "-")


def _star(value: float, best: float) -> str:
    return "*" if value == best else ""


def _over_random(row: Row) -> str:
    """The paired difference from random tokens, in accuracy where there is one."""
    if row.over_random is None:
        return ""
    points, kl = row.over_random.accuracy, row.over_random.kl
    if points is not None:
        return f"{points.value * 100:+.1f} [{points.low * 100:+.1f}, {points.high * 100:+.1f}] points"
    return f"KL {kl.value:+.3f} [{kl.low:+.3f}, {kl.high:+.3f}]"

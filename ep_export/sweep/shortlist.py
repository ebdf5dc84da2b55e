"""The few ways of pruning that a reader is shown first, of every keep.

Every method stands there once, at the layer where it did best. That is picked in hindsight and flatters it;
what was chosen beforehand, the recommendation, is not picked and always shown, and so is the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep_export.methods import SCALED
from ep_export.policy import ADAPTIVE
from ep_export.sweep.record import PAPER, RANDOM, RECOMMENDED, SCHEDULE, Row, SameBudget, SweepRecord

__all__ = ["Shortlist", "charted", "first_token_shortlist", "shortlist"]

_ALWAYS = frozenset({RECOMMENDED, ADAPTIVE, SCHEDULE, PAPER, SCALED.key, RANDOM})
"""Shown whatever came out."""
_MOST = 9
"""Rows of a table: with more nobody sees the first."""


@dataclass(frozen=True)
class Shortlist:
    """A table of few rows.

    Attributes:
        keep: Average share over all layers.
        rows: The best first.
        ties: Ways that are not told apart from the best and not shown.
        others: Ways that are worse and not shown.
    """

    keep: float
    rows: tuple[Row, ...]
    ties: int
    others: int


def shortlist(record: SweepRecord, keep: float) -> Shortlist:
    """Of the ways that keep the same average of tokens, those to show."""
    rows = _ranked(record, keep, SameBudget.AVERAGE)
    leaders = _one_a_method(rows)
    shown = [row for row in leaders if row.method in _ALWAYS or row is leaders[0] or row.below_best is None]
    shown += [row for row in leaders if row not in shown][: max(0, _MOST - len(shown))]
    return _of(keep, rows, shown)


def first_token_shortlist(record: SweepRecord, keep: float) -> Shortlist | None:
    """The picture scaled down to the same FLOPs up to the first token, beside pruning; None without one."""
    rows = _ranked(record, keep, SameBudget.FIRST_TOKEN)
    if all(row.budget is SameBudget.AVERAGE for row in rows):
        return None
    leaders = _one_a_method(rows)
    pruned = [row for row in leaders if row.cuts]
    shown = [row for row in leaders if not row.cuts or row is pruned[0] or row.below_best is None]
    shown += [row for row in pruned if row.method in {RECOMMENDED, RANDOM} and row not in shown]
    return _of(keep, rows, shown)


def charted(record: SweepRecord) -> dict[str, tuple[Row, ...]]:
    """Method -> a row a keep, for the first chart: what is always shown, smaller pictures and every best."""
    full = [row for row in record.rows if row.weights is None]
    methods = _ALWAYS | {row.method for row in full if row.below_best is None or not row.cuts}
    curves = {}
    for method in (info.key for info in record.methods if info.key in methods):
        at_keeps = [_at_best_layer(record, method, keep) for keep in record.keeps]
        curves[method] = tuple(row for row in at_keeps if row is not None)
    return curves


def _at_best_layer(record: SweepRecord, method: str, keep: float) -> Row | None:
    rows = [row for row in record.rows if (row.method, row.keep) == (method, keep)]
    return min(rows, key=_order, default=None)


def _ranked(record: SweepRecord, keep: float, budget: SameBudget) -> list[Row]:
    rows = (row for row in record.rows if row.keep == keep and row.belongs(budget))
    return sorted((row for row in rows if row.weights is None), key=_order)


def _order(row: Row) -> tuple[float, bool, float]:
    """The best first; of equal ones that which the others are compared with, then the closest by KL."""
    return -row.measure.value, row.below_best is not None, row.kl.value


def _one_a_method(rows: Sequence[Row]) -> list[Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.method, row)
    return list(first.values())


def _of(keep: float, rows: Sequence[Row], shown: Sequence[Row]) -> Shortlist:
    hidden = [row for row in rows if row not in shown]
    ties = sum(row.tied for row in hidden)
    return Shortlist(keep, tuple(sorted(shown, key=_order)), ties, len(hidden) - ties)

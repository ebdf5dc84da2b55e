"""Right answers by kind of question, where the prompts name kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep_export.sweep.record import Row, SweepRecord
from ep_export.sweep.statistics import MeanInterval, wilson

__all__ = ["OneKind", "by_kind"]


@dataclass(frozen=True)
class OneKind:
    """One kind of question.

    Attributes:
        name: As the prompts call it; empty for questions without one.
        questions: How many.
        unpruned: Right answers of the unpruned model.
        rows: Right answers of every row asked for, in order.
    """

    name: str
    questions: int
    unpruned: MeanInterval
    rows: tuple[MeanInterval, ...]


def by_kind(record: SweepRecord, rows: Sequence[Row]) -> tuple[OneKind, ...]:
    """Share of right answers of every kind; empty where no answers or no kinds were given.

    Intervals are Wilson's over the questions of a kind; several draws of a row of chance count as one trial.
    """
    names = [question.kind or "" for question in record.questions]
    if not record.unpruned.right or not any(names):
        return ()
    kinds = []
    for name in sorted(set(names), key=lambda name: (not name, name)):
        places = [place for place, one in enumerate(names) if one == name]
        kinds.append(
            OneKind(
                name,
                len(places),
                _share((record.unpruned.right,), places),
                tuple(_share(row.right, places) for row in rows),
            )
        )
    return tuple(kinds)


def _share(draws: Sequence[str], places: Sequence[int]) -> MeanInterval:
    right = sum(draw[place] == "1" for draw in draws for place in places) / len(draws)
    low, high = wilson(right, len(places))
    return MeanInterval(right / len(places), low, high, "wilson")

"""What a sweep says, in sentences: the same ones in the terminal, the report and a README.

Every sentence is computed from the record; a comparison is called better or worse only where the paired 95%
interval leaves out zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ep_export.sweep.record import Estimate, Row, SweepRecord

__all__ = ["PAPER", "RANDOM", "RECOMMENDED", "estimate_text", "findings", "measure_of", "standing"]

RANDOM = "random"
RECOMMENDED = "recommended"
PAPER = "paper-highest"


def findings(record: SweepRecord) -> tuple[str, ...]:
    """The findings, most important first."""
    said = [_unpruned(record)]
    for keep in record.keeps:
        said += _at_keep(record, keep)
    said += _entropy_against_random(record)
    said.append(f"Collapse: {record.entropies.finding}.")
    if record.dataset.skipped:
        names = ", ".join(skipped.name for skipped in record.dataset.skipped[:3])
        said.append(f"Left out: {len(record.dataset.skipped)} that could not be used ({names}).")
    return tuple(said)


def measure_of(record: SweepRecord, row: Row) -> Estimate:
    """What rows are ranked by: accuracy where right answers are known, else agreement with the full model."""
    return row.accuracy if record.dataset.answers and row.accuracy is not None else row.agreement


def estimate_text(estimate: Estimate) -> str:
    """A share with its interval, in per cent."""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def standing(row: Row, other: str) -> int | None:
    """1 when the row beats another method at its layer and keep, -1 when it loses, 0 when not told apart.

    By accuracy, by KL where no answers are known; None when they were not compared.
    """
    for difference in row.versus:
        if difference.method != other:
            continue
        if difference.accuracy is not None:
            return _side(difference.accuracy)
        return -_side(difference.kl)  # a smaller KL is better
    return None


def _side(difference: Estimate) -> int:
    return 1 if difference.low > 0 else -1 if difference.high < 0 else 0


def _unpruned(record: SweepRecord) -> str:
    asked = f"{record.dataset.questions} questions about {record.dataset.pictures} pictures"
    full = record.unpruned.accuracy
    if full is None:
        return f"{asked}; no right answers are known, so fidelity to the unpruned model is compared."
    return f"Unpruned, the model answers {estimate_text(full)} of {asked} exactly."


def _at_keep(record: SweepRecord, keep: float) -> Iterable[str]:
    rows = [row for row in record.rows if row.keep == keep]
    if not rows:
        return
    best = max(rows, key=lambda row: measure_of(record, row).value)
    title = record.method(best.method).title
    said = f"Keep {keep:g}: best in hindsight is {title} at layer {best.layer}, {_text(record, best)}"
    ours = next((row for row in rows if row.method == RECOMMENDED), None)
    if ours is not None:
        saved = 1 - ours.flops / record.unpruned.flops
        what = f" ({ours.found_by})" if ours.found_by else ""
        said += f"; the recommended policy{what}, chosen beforehand, {_text(record, ours)}"
        said += f" for {saved:.0%} fewer FLOPs"
        paper, floor = (record.row(name, ours.layer, keep) for name in (PAPER, RANDOM))
        others = [
            f"{record.method(row.method).title} {measure_of(record, row).value:.1%}"
            for row in (paper, floor)
            if row is not None
        ]
        said += f"; there {' and '.join(others)}" if others else ""
    yield said + "."


def _entropy_against_random(record: SweepRecord) -> Iterable[str]:
    """Whether the published policy beats the floor, over every layer and keep where both were measured."""
    rows = [row for row in record.rows if row.method == PAPER and standing(row, RANDOM) is not None]
    if not rows:
        return
    better, worse = (_places(rows, side) for side in (1, -1))
    title = record.method(PAPER).title
    parts = [f"better at {better}" if better else "", f"worse at {worse}" if worse else ""]
    told = " and ".join(part for part in parts if part) or "not told apart anywhere"
    count = "one combination" if len(rows) == 1 else f"{len(rows)} combinations"
    yield f"{title} against random tokens, {count} of layer and keep: {told}."


def _places(rows: Sequence[Row], side: int) -> str:
    found = [row for row in rows if standing(row, RANDOM) == side]
    places = ", ".join(f"layer {row.layer} keep {row.keep:g}" for row in found[:4])
    return f"{len(found)} ({places}{', ...' if len(found) > 4 else ''})" if found else ""


def _text(record: SweepRecord, row: Row) -> str:
    return estimate_text(measure_of(record, row))

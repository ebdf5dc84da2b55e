"""What a sweep says, in sentences: the same ones in the terminal, the report and a README.

Every sentence is computed from the record; a comparison is called better or worse only where the paired 95%
interval leaves out zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ep_export.policy import ADAPTIVE
from ep_export.sweep.names import called, places
from ep_export.sweep.record import (
    PAPER,
    RANDOM,
    RECOMMENDED,
    SCHEDULE,
    RoundedUnpruned,
    Row,
    SameBudget,
    SweepRecord,
)

__all__ = ["findings", "rounding_cost"]


def findings(record: SweepRecord) -> tuple[str, ...]:
    """The findings, most important first."""
    said = [*record.notes[:1]] if record.scarce else []
    said.append(_unpruned(record))
    said += [rounding_cost(one) for one in record.rounded]
    for keep in record.keeps:
        said += _at_keep(record, keep)
    said += _paper_against_random(record)
    said.append(f"Collapse: {record.entropies.finding}.")
    if record.dataset.skipped:
        names = ", ".join(skipped.name for skipped in record.dataset.skipped[:3])
        said.append(f"Left out: {len(record.dataset.skipped)} that could not be used ({names}).")
    return tuple(said)


def _unpruned(record: SweepRecord) -> str:
    questions = f"{record.dataset.questions} questions about {record.dataset.pictures} pictures"
    full = record.unpruned.accuracy
    if full is None:
        return f"{questions}; no right answers are known, so fidelity to the unpruned model is compared."
    return f"Unpruned, the model answers {full} of {questions} exactly."


def rounding_cost(one: RoundedUnpruned) -> str:
    """What rounded weights cost before anything is pruned."""
    how = "rounded to the nearest" if one.weights.rounding == "nearest" else "rounded by calibration pictures"
    right = f", {one.accuracy} right" if one.accuracy is not None else ""
    return (
        f"{one.name} weights, {how}, unpruned: KL {one.kl.value:.4f} from full weights, the same top token "
        f"at {one.agreement.value:.1%} of positions{right}."
    )


def _at_keep(record: SweepRecord, keep: float) -> Iterable[str]:
    rows = [row for row in record.rows if row.keep == keep and row.weights is None]
    if not rows:
        return
    best = next((row for row in rows if row.below_best is None), rows[0])
    tied = [row for row in rows if row.tied and row is not best and row.budget is best.budget]
    said = f"Keep {keep:g}: best in hindsight is {called(record, best)}, {best.measure}{_ties(record, tied)}"
    ours = next((row for row in rows if row.method == RECOMMENDED), None)
    if ours is not None:
        saved = 1 - ours.first_token_flops / record.unpruned.first_token_flops
        decoder = 1 - ours.flops / record.unpruned.flops
        said += f"; the recommended policy ({places(record, ours)}), chosen beforehand, {ours.measure}"
        said += f" for {saved:.0%} fewer FLOPs to the first token (decoder alone {decoder:.0%})"
        there = (record.row(name, ours.layer, keep) for name in (PAPER, RANDOM))
        others = [f"{record.method(row.method).title} {row.measure.value:.1%}" for row in there if row]
        said += f"; there {' and '.join(others)}" if others else ""
    yield said + "."
    yield from _smaller_picture(record, rows, best)
    yield from _adaptive(record, rows)
    told = next((row for row in rows if row.method == SCHEDULE), None)
    if told is not None:
        yield f"Your schedule at keep {keep:g} ({places(record, told)}): {told.measure}."


def _ties(record: SweepRecord, tied: Sequence[Row]) -> str:
    """Rows that are not told apart from the best, the closest first."""
    if not tied:
        return ", told apart from all others"
    tied = sorted(tied, key=lambda row: -row.measure.value)
    names = ", ".join(called(record, row) for row in tied[:3])
    more = f" and {len(tied) - 3} more" if len(tied) > 3 else ""
    return f", a tie with {names}{more}"


def _smaller_picture(record: SweepRecord, rows: Sequence[Row], best: Row) -> Iterable[str]:
    """Pruning against scaling the picture down, at either budget."""
    for row in rows:
        if row.cuts or row is best or row.below_best is None:
            continue
        same = "FLOPs to the first token" if row.budget is SameBudget.FIRST_TOKEN else "average tokens"
        verdict = {1: "worse than the best", 0: "a tie with the best", -1: "better than any pruning"}
        yield (
            f"A smaller picture at the same {same} ({row.kept_tokens[0]:.0f} visual tokens, "
            f"{row.first_token_flops / record.unpruned.first_token_flops:.0%} of the unpruned first token): "
            f"{row.measure}, {verdict[row.below_best.side]}."
        )


def _adaptive(record: SweepRecord, rows: Sequence[Row]) -> Iterable[str]:
    """Every picture's own number beside the same cut with the same share of every picture."""
    own = next((row for row in rows if row.method == ADAPTIVE), None)
    if own is None:
        return
    fixed = next((row for row in rows if row.cuts == own.cuts and row is not own), None)
    beside = ""
    if fixed is not None:
        beside = f", with a fixed keep {fixed.measure} for {fixed.flops / own.flops:.0%} of its FLOPs"
    yield f"Every picture keeping its own number ({places(record, own)}): {own.measure}{beside}."


def _paper_against_random(record: SweepRecord) -> Iterable[str]:
    """Whether the published policy beats the floor, over every layer and keep where both were measured."""
    rows = [row for row in record.rows if row.method == PAPER and row.over_random is not None]
    if not rows:
        return
    better, worse = (_places(rows, side) for side in (1, -1))
    title = record.method(PAPER).title
    parts = [f"better at {better}" if better else "", f"worse at {worse}" if worse else ""]
    told = " and ".join(part for part in parts if part) or "not told apart anywhere"
    count = "one combination" if len(rows) == 1 else f"{len(rows)} combinations"
    yield f"{title} against random tokens, {count} of layer and keep: {told}."


def _places(rows: Sequence[Row], side: int) -> str:
    chosen = [row for row in rows if row.over_random is not None and row.over_random.standing == side]
    places = ", ".join(f"layer {row.layer} keep {row.keep:g}" for row in chosen[:4])
    return f"{len(chosen)} ({places}{', ...' if len(chosen) > 4 else ''})" if chosen else ""

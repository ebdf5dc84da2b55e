"""Ways of pruning in words for people: titles of methods, and where they drop tokens."""

from __future__ import annotations

from ep_export.policy import ADAPTIVE, Nothing
from ep_export.sweep.record import RECOMMENDED, SCHEDULE, Row, SweepRecord

__all__ = ["called", "places", "title_of"]


def title_of(record: SweepRecord, key: str) -> str:
    """The title of a method, whether the sweep compared it or a cut of a schedule names it."""
    for method in record.methods:
        if method.key == key:
            return method.title
    from ep_export.methods import method_named  # imports torch

    return method_named(key).title


def called(record: SweepRecord, row: Row) -> str:
    """A row in a sentence, e.g. `DivPrune at layer 2`."""
    title = title_of(record, row.method)
    return f"{title} {_at(row.layer)}" if len(row.cuts) == 1 else title


def places(record: SweepRecord, row: Row) -> str:
    """Where a row drops tokens, with what drops them where its title does not say so.

    E.g. `at layer 2`, or `DivPrune at layer 1, then Random at layer 3`.
    """
    if not row.cuts:
        return f"scaled down to {row.kept_tokens[0]:.0f} visual tokens"
    if row.method not in {RECOMMENDED, SCHEDULE, ADAPTIVE} and len({cut.method for cut in row.cuts}) == 1:
        *others, last = (str(cut.layer) for cut in row.cuts)
        return f"at layers {', '.join(others)} and {last}" if others else _at(row.layer)
    return ", then ".join(
        f"no visual token from layer {cut.layer} on"
        if cut.method == Nothing().name
        else f"{title_of(record, cut.method)} {_at(cut.layer)}"
        for cut in row.cuts
    )


def _at(layer: int) -> str:
    return f"at layer {layer}" if layer else "before the decoder"

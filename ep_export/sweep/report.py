"""The sweep as one HTML page, `report.html`, and its charts as one picture, `sweep.png`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_export.aliases import short_name
from ep_export.bundle import hash_file
from ep_export.errors import UserError
from ep_export.measure.ways import on_weights
from ep_export.page import render
from ep_export.runtime.pictures import open_picture
from ep_export.sweep.charts import (
    drawn_methods,
    entropy_panel,
    first_panels,
    layer_panels,
    look_of,
    save_png,
    svg,
)
from ep_export.sweep.findings import findings
from ep_export.sweep.kinds import OneKind, by_kind
from ep_export.sweep.names import places, title_of
from ep_export.sweep.record import (
    RANDOM,
    RECOMMENDED,
    GalleryAnswer,
    GalleryEntry,
    MethodInfo,
    Recommended,
    Row,
    SweepRecord,
)
from ep_export.sweep.shortlist import charted, first_token_shortlist, shortlist
from ep_export.validate.picture import draw_kept

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.sweep.statistics import MeanInterval

__all__ = ["REPORT_FILE", "write_report"]

REPORT_FILE = "report.html"
_THUMBNAIL, _HERO = 280, 640
"""Pixels of a picture's longer side, in the gallery and at the top: a page stays below a few megabytes."""

_NAMES = {"accuracy": "right answers", "agreement": "agreement with the unpruned model", "kl": "KL, nats"}


def write_report(out: Path, record: SweepRecord) -> Path:
    """Write `report.html` and `sweep.png` beside `sweep.json`.

    Args:
        out: The sweep's directory, gallery pictures in it.
        record: The sweep.

    Returns:
        The HTML file.

    Raises:
        UserError: A gallery picture is missing or was changed.
    """
    save_png(record, out / "sweep.png")
    page = render(
        "sweep/report.html.j2",
        record=record,
        model=short_name(record.model),
        findings=findings(record),
        hero=_hero(out, record),
        tiles=list(_tiles(record)),
        title_of=partial(title_of, record),
        places=partial(places, record),
        first_panels=first_panels(record),
        charted=list(charted(record)),
        first=[shortlist(record, keep) for keep in record.keeps],
        scaled=[one for keep in record.keeps if (one := first_token_shortlist(record, keep)) is not None],
        layer_panels=layer_panels(record),
        entropy_panel=entropy_panel(record),
        svg=svg,
        look_of=look_of,
        methods=drawn_methods(record),
        tables=list(_tables(record)),
        names=_NAMES,
        kinds=list(_kinds(record)),
        rounded=list(_rounded(record)),
        costs=[
            (layer, [_saved(record, layer, keep) for keep in record.keeps]) for layer in record.swept_layers
        ],
        gallery=[_entry(out, record, entry) for entry in record.gallery],
        facts=_facts(record),
    )
    file = out / REPORT_FILE
    aside = file.with_name(f".{file.name}.part")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    return file


def _tiles(record: SweepRecord) -> Iterator[tuple[str, Row]]:
    """For every keep what a reader should remember: the recommended row, or the best where there is none."""
    for keep in record.keeps:
        rows = shortlist(record, keep).rows
        row = next((row for row in rows if row.method == RECOMMENDED), rows[0])
        name = "recommended" if row.method == RECOMMENDED else "best in hindsight"
        yield f"keep {keep:g}, {name}", row


def _hero(out: Path, record: SweepRecord) -> dict[str, Any] | None:
    """The first picture of the gallery, with what the recommendation (or what stands first) kept of it."""
    for entry in record.gallery[:1]:
        shown = sorted(
            (answer for answer in entry.answers if answer.kept),
            key=lambda answer: (answer.method != RECOMMENDED, answer.method == RANDOM, answer.keep),
        )
        if shown:
            picture = _gallery_picture(out, entry)
            drawn = _answer(record, picture, shown[0], _HERO)
            return {"entry": entry, "picture": picture.resize(_fit(picture.size, _HERO)), **drawn}
    return None


def _kinds(record: SweepRecord) -> Iterator[tuple[float, tuple[Row, ...], tuple[OneKind, ...]]]:
    """For every keep the rows that are shown first, by kind of question."""
    for keep in record.keeps:
        rows = shortlist(record, keep).rows
        if kinds := by_kind(record, rows):
            yield keep, rows, kinds


def _rounded(record: SweepRecord) -> Iterator[tuple[float, list[tuple[Row, list[Row | None]]]]]:
    """For every keep the rows that are shown first, with the same on every rounding of the weights."""
    for keep in record.keeps if record.rounded else ():
        rows = shortlist(record, keep).rows
        yield (
            keep,
            [
                (
                    row,
                    [record.row(on_weights(row.method, one.name), row.layer, keep) for one in record.rounded],
                )
                for row in rows
            ],
        )


def _tables(record: SweepRecord) -> Iterator[dict[str, Any]]:
    """For every keep its tables: what rows are ranked by first, the others folded away."""
    names = ("accuracy", "agreement", "kl") if record.dataset.answers else ("agreement", "kl")
    for keep in record.keeps:
        layers = [
            layer
            for layer in record.swept_layers
            if any((row.layer, row.keep) == (layer, keep) for row in record.rows)
        ]
        tables = [(name, list(_lines(record, keep, layers, name))) for name in names]
        yield {"keep": keep, "layers": layers, "first": tables[0], "more": tables[1:]}


def _lines(
    record: SweepRecord, keep: float, layers: list[int], figure: str
) -> Iterator[tuple[MethodInfo, list[Mapping[str, Any] | None]]]:
    """A line a method: a cell for every layer, None where it was not measured."""
    here = {layer: [row for row in record.rows if (row.layer, row.keep) == (layer, keep)] for layer in layers}
    pick = min if figure == "kl" else max
    best = {layer: pick(getattr(row, figure).value for row in rows) for layer, rows in here.items()}
    for method in record.methods:
        rows = [record.row(method.key, layer, keep) for layer in layers]
        if any(rows):
            yield method, [_cell(row, figure, best[row.layer]) if row else None for row in rows]


def _cell(row: Row, figure: str, best: float) -> Mapping[str, Any]:
    mean: MeanInterval = getattr(row, figure)
    if figure == "kl":
        text, interval = f"{mean.value:.3g}", f"{mean.low:.2g} to {mean.high:.2g}"
    else:
        text, interval = f"{mean.value:.1%}", f"{100 * mean.low:.0f} to {100 * mean.high:.0f}"
    standing = row.over_random.standing_in(figure) if row.over_random is not None else 0
    cell = {"text": text, "interval": interval, "standing": standing}
    return {**cell, "best": mean.value == best, "published": bool(row.published)}


def _saved(record: SweepRecord, layer: int, keep: float) -> Mapping[str, str] | None:
    """FLOPs, cache and measured prefill: the same for all methods of one cut but for what choosing costs."""
    rows = [r for r in record.rows if (r.layer, r.keep) == (layer, keep) and len(r.cuts) == 1]
    if not rows:
        return None
    names = {"first_token_flops": "first-token FLOPs", "flops": "decoder FLOPs", "kv_bytes": "cache"}
    saved = [
        f"{title} -{1 - getattr(rows[0], name) / getattr(record.unpruned, name):.0%}"
        for name, title in names.items()
    ]
    timed = sorted(row.prefill.speedup for row in rows if row.prefill is not None)
    speedup = " to ".join(dict.fromkeys(f"{s:.2f}" for s in (timed[0], timed[-1]))) if timed else ""
    return {"text": ", ".join(saved), "speedup": speedup}


def _gallery_picture(out: Path, entry: GalleryEntry) -> Image.Image:
    file = out / entry.picture
    if not file.is_file() or hash_file(file) != entry.sha256:
        raise UserError(
            f"gallery picture {entry.picture} is missing or was changed", hint="run `ep-export sweep` again"
        )
    return open_picture(file)


def _entry(out: Path, record: SweepRecord, entry: GalleryEntry) -> dict[str, Any]:
    """A gallery picture: itself, and by keep what every method kept and answered."""
    picture = _gallery_picture(out, entry)
    order = {method.key: number for number, method in enumerate(record.methods)}
    order |= {RECOMMENDED: -2, RANDOM: -1}
    answers = sorted(entry.answers, key=lambda answer: order[answer.method])
    return {
        "entry": entry,
        "picture": picture.resize(_fit(picture.size, _THUMBNAIL)),
        "keeps": [
            (keep, [_answer(record, picture, one, _THUMBNAIL) for one in answers if one.keep == keep])
            for keep in sorted({answer.keep for answer in answers}, reverse=True)
        ],
    }


def _answer(record: SweepRecord, picture: Image.Image, answer: GalleryAnswer, side: int) -> dict[str, Any]:
    """A way's answer, with the picture after its deepest cut that leaves any of it."""
    cuts = [
        sum(int(mask.sum()) for mask in masks) for masks in zip(*(p.masks for p in answer.kept), strict=True)
    ]
    seen = max((cut for cut, count in enumerate(cuts) if count), default=0)
    drawn = []
    for part in answer.kept:
        drawing = draw_kept(picture, part.token_grid, part.masks[seen], view=part.view)
        about = f"{part.masks[seen].sum()} of {part.kept.size} tokens kept"
        drawn.append((drawing.resize(_fit(drawing.size, side)), about))
    row = record.row(answer.method, answer.layer, answer.keep)
    return {
        "answer": answer,
        "title": title_of(record, answer.method),
        "where": places(record, row) if row is not None else "",
        "kept": f"{', then '.join(map(str, cuts))} of {sum(part.kept.size for part in answer.kept)} tokens",
        "drawn": drawn,
    }


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _facts(record: SweepRecord) -> dict[str, str]:
    unpruned, data = record.unpruned, record.dataset
    return {
        "Model": f"{record.model} ({record.family}, {record.layers} layers)",
        "Fingerprint": record.fingerprint,
        "Data": f"{data.name}: {data.questions} questions about {data.pictures} pictures",
        "Unpruned": f"{unpruned.accuracy or 'not known'}; on average {unpruned.visual_tokens:.0f} visual "
        f"tokens and {unpruned.text_tokens:.0f} others",
        "Recommended": "; ".join(map(_recommended, record.recommended)) or "no recommendation was compared",
        "Left out": "; ".join(f"{s.name}: {s.reason}" for s in data.skipped) or "nothing",
        "Machine": record.machine,
        "Took": f"{record.seconds / 60:.1f} minutes",
        "Made with": ", ".join(f"{name} {version}" for name, version in record.tools.items()),
        "Notes": "; ".join(record.notes) or "none",
    }


def _recommended(one: Recommended) -> str:
    known = {True: "", False: ", some of which are asked about here", None: ""}[one.held_out]
    return (
        f"keep {one.keep:g}: {one.schedule or 'none'} (from {one.pictures} pictures of {one.source}{known})"
    )

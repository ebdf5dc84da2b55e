"""The sweep as one HTML file: no network, no script, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ep_export.aliases import short_name
from ep_export.bundle import hash_file
from ep_export.errors import UserError
from ep_export.sweep.charts import (
    Panel,
    entropy_panel,
    flops_panels,
    layer_panels,
    look_of,
    save_png,
    svg,
)
from ep_export.sweep.findings import RANDOM, RECOMMENDED, estimate_text, findings
from ep_export.sweep.record import GalleryAnswer, GalleryEntry, SweepRecord
from ep_export.sweep.tables import cost_table, matrix
from ep_export.validate.picture import draw_kept, inline_image
from ep_export.validate.style import STYLE

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["REPORT_FILE", "write_report"]

REPORT_FILE = "report.html"
_THUMBNAIL = 340
"""Pixels of a gallery picture's longer side: a dozen a picture stay below a few megabytes."""
_JPEG_QUALITY = 80

_MORE = """
.panels{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}
.panels figure{max-width:640px;background:var(--card);
border:1px solid var(--line);border-radius:12px;padding:10px;margin:0}
.panels svg{width:100%;height:auto;display:block}
.panels figcaption{font-size:.85rem;font-weight:600;color:var(--ink);margin:2px 4px 6px}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;list-style:none;padding:0;margin:.6em 0 1em;font-size:.85rem}
.legend i{display:inline-block;width:22px;border-top:3px solid;vertical-align:middle;margin-right:5px}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:12px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
td small{color:var(--soft);display:block;font-weight:400}td.best{font-weight:700}
.up{color:var(--PASS)}.down{color:var(--FAIL)}
tr.ours td,tr.ours th{background:color-mix(in srgb,#e0218a 9%,var(--card))}
h3{margin:1.2em 0 .5em}details{margin:.8em 0}summary{cursor:pointer;color:var(--soft)}
.gallery{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));margin-top:10px}
.gallery figure{margin:0}.gallery figcaption{color:var(--ink);line-height:1.3}
.gallery b{overflow-wrap:anywhere}.entry{margin:0 0 16px}
header ul li{margin:.35em 0}
@media(max-width:640px){th,td{padding:5px 7px}tbody th{white-space:normal;min-width:7.5em}}
@media print{.panels{grid-template-columns:1fr 1fr 1fr}.gallery{grid-template-columns:repeat(5,1fr)}
table{font-size:8pt}th,td{padding:3px 5px;white-space:normal}
.panels figure,.gallery figure{break-inside:avoid}}
"""


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
    sections = [_head(record), _flops(record), _layers(record), _tables(record), _entropy(record)]
    if record.gallery:
        sections.append(_gallery(out, record))
    sections.append(_about(record))
    title = html.escape(f"Sweep of {short_name(record.model)}")
    body = "\n".join(sections)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{_MORE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )
    file = out / REPORT_FILE
    aside = file.with_name(f".{file.name}.part")
    aside.write_text(page, encoding="utf-8")
    aside.replace(file)
    return file


def _head(record: SweepRecord) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(record))
    asked = f"{record.dataset.questions} questions, {len(record.rows)} ways of pruning"
    return (
        f'<header><p class="kicker">Pruning compared · {html.escape(asked)} · {html.escape(record.date)}</p>'
        f"<h1>{html.escape(short_name(record.model))}</h1><ul>{items}</ul></header>"
    )


def _flops(record: SweepRecord) -> str:
    note = (
        "Every point is a keep; the dotted line is the unpruned model, bands are 95% intervals. All "
        "methods of a panel prune at the same place and keep the same number of tokens."
    )
    return _charts("What it costs and saves", note, flops_panels(record), _legend(record))


def _layers(record: SweepRecord) -> str:
    note = "The same figures by layer: where a method works says as much about the model as which one does."
    return _charts("Layer by layer", note, layer_panels(record), _legend(record))


def _entropy(record: SweepRecord) -> str:
    note = f"{record.entropies.finding}. Bands: one standard deviation over pictures."
    return _charts("Does entropy collapse?", note, (entropy_panel(record),), "")


def _charts(title: str, note: str, panels: Iterable[Panel], legend: str) -> str:
    made = "".join(
        f'<figure role="img" aria-label="{html.escape(panel.about)}">'
        f"<figcaption>{html.escape(panel.title)}</figcaption>{svg(panel)}</figure>"
        for panel in panels
    )
    return (
        f'<section><h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>{legend}'
        f'<div class="panels">{made}</div></section>'
    )


def _legend(record: SweepRecord) -> str:
    items = []
    for method in record.methods:
        look = look_of(record, method.key)
        style = f"border-color:{look.colour};border-top-style:{'dashed' if look.dashed else 'solid'}"
        items.append(f'<li><i style="{style}"></i>{html.escape(method.title)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _tables(record: SweepRecord) -> str:
    ranked = "accuracy" if record.dataset.answers else "agreement"
    other = "agreement" if record.dataset.answers else "kl"
    note = (
        "Columns are the layer before which tokens are pruned. ▲ ▼: better or worse than random tokens "
        "there, the paired 95% interval leaving out zero. Bold: the best of a column."
    )
    parts = [f'<section><h2>The figures</h2><p class="note">{html.escape(note)}</p>']
    for keep in record.keeps:
        parts.append(f"<h3>keep {keep:g}, {ranked}</h3>{matrix(record, keep, ranked)}")
        more = "".join(
            f"<h3>keep {keep:g}, {name}</h3>{matrix(record, keep, name)}"
            for name in dict.fromkeys((other, "kl"))
        )
        parts.append(
            f"<details><summary>fidelity to the unpruned model at keep {keep:g}</summary>{more}</details>"
        )
    parts.append(f"<h3>saved, by layer and keep</h3>{cost_table(record)}</section>")
    return "".join(parts)


def _gallery(out: Path, record: SweepRecord) -> str:
    note = (
        "Chosen evenly over the questions, not by outcome. In colour: patches that reach the upper layers. "
        "✓ and ✗: the right answer or not."
    )
    made = "".join(_entry(out, record, entry) for entry in record.gallery)
    head = f'<h2>What is kept, and what is answered</h2><p class="note">{html.escape(note)}</p>'
    return f"<section>{head}{made}</section>"


def _entry(out: Path, record: SweepRecord, entry: GalleryEntry) -> str:
    file = out / entry.picture
    if not file.is_file() or hash_file(file) != entry.sha256:
        raise UserError(
            f"gallery picture {entry.picture} is missing or was changed", hint="run `ep-export sweep` again"
        )
    from PIL import Image as Images

    with Images.open(file) as opened:
        picture = opened.convert("RGB")
    order = {method.key: number for number, method in enumerate(record.methods)}
    first = {RECOMMENDED: -2, RANDOM: -1}
    answers = sorted(entry.answers, key=lambda a: (-a.keep, first.get(a.method, order.get(a.method, 0))))
    kept = "".join(
        _kept_at(record, entry, picture, keep, answers) for keep in sorted({a.keep for a in answers})
    )
    known = "" if entry.answer is None else f"<dt>Right answer</dt><dd>{html.escape(entry.answer)}</dd>"
    sign = "" if entry.full_right is None else " ✓" if entry.full_right else " ✗"
    whole = inline_image(picture.resize(_fit(picture.size)), "the picture", quality=_JPEG_QUALITY)
    return (
        '<article class="entry"><dl class="qa">'
        f"<dt>Question</dt><dd>{html.escape(entry.question)}</dd>{known}"
        f"<dt>Unpruned</dt><dd>{html.escape(entry.full_answer)}{sign}</dd></dl>"
        f'<div class="gallery"><figure>{whole}<figcaption>the picture</figcaption></figure></div>{kept}'
        "</article>"
    )


def _kept_at(
    record: SweepRecord,
    entry: GalleryEntry,
    picture: Image.Image,
    keep: float,
    answers: Sequence[GalleryAnswer],
) -> str:
    """All answers at one keep, folded away but for the smallest keep, where methods differ most."""
    shown = [answer for answer in answers if answer.keep == keep]
    made = "".join(_answer(record, entry, picture, answer) for answer in shown)
    right = sum(answer.right for answer in shown)
    is_open = " open" if keep == min(answer.keep for answer in answers) else ""
    return (
        f"<details{is_open}><summary>keep {keep:g}: {right} of {len(shown)} right</summary>"
        f'<div class="gallery">{made}</div></details>'
    )


def _answer(record: SweepRecord, entry: GalleryEntry, picture: Image.Image, answer: GalleryAnswer) -> str:
    drawn = []
    for part, cells in zip(entry.parts, answer.kept_cells, strict=True):
        kept = np.zeros(part.token_grid[0] * part.token_grid[1], dtype=np.bool_)
        kept[list(cells)] = True
        drawing = draw_kept(picture, part.token_grid, kept, view=part.view)
        caption = f"{len(cells)} of {kept.size} patches kept"
        drawn.append(inline_image(drawing.resize(_fit(drawing.size)), caption, quality=_JPEG_QUALITY))
    method = record.method(answer.method)
    sign = '<span class="up">✓</span>' if answer.right else '<span class="down">✗</span>'
    where = f"before layer {answer.layer}" if answer.layer else "before the decoder"
    said = html.escape(answer.answer) or "(empty)"
    caption = f"{html.escape(method.title)}<br><small>{where}</small><br><b>{said}</b> {sign}"
    return f"<figure>{''.join(drawn)}<figcaption>{caption}</figcaption></figure>"


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    scale = _THUMBNAIL / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _about(record: SweepRecord) -> str:
    methods = "".join(
        f"<dt>{html.escape(method.title)}</dt>"
        f"<dd>{html.escape(method.idea)} <small>{html.escape(method.source)}</small></dd>"
        for method in record.methods
    )
    unpruned, data = record.unpruned, record.dataset
    full = "not known" if unpruned.accuracy is None else estimate_text(unpruned.accuracy)
    facts = {
        "Model": f"{record.model} ({record.family}, {record.layers} layers)",
        "Fingerprint": record.fingerprint,
        "Data": f"{data.name}: {data.questions} questions about {data.pictures} pictures",
        "Unpruned": f"{full}; on average {unpruned.visual_tokens:.0f} visual tokens and "
        f"{unpruned.text_tokens:.0f} others",
        "Recommended": "; ".join(_recommended(record)) or "no recommendation was compared",
        "Left out": "; ".join(f"{s.name}: {s.reason}" for s in data.skipped) or "nothing",
        "Machine": record.machine,
        "Took": f"{record.seconds / 60:.1f} minutes",
        "Made with": ", ".join(f"{name} {version}" for name, version in record.tools.items()),
        "Notes": "; ".join(record.notes) or "none",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return (
        f'<section><h2>The methods</h2><dl class="settings">{methods}</dl></section>'
        f'<section><h2>What was compared</h2><dl class="settings">{rows}</dl></section>'
    )


def _recommended(record: SweepRecord) -> Sequence[str]:
    return [
        f"keep {each.keep:g}: {each.policy or 'none'} from {each.pictures} pictures of {each.source}"
        + ("" if each.held_out else ", some of which are asked about here")
        for each in record.recommended
    ]

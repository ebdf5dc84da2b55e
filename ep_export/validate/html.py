"""The report as one HTML file: no network, no script, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ep_export.validate.picture import draw_kept, inline_image
from ep_export.validate.report import Case, KeptPicture, Report, Stage, Verdict
from ep_export.validate.style import STYLE

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["write_html"]

_JPEG_QUALITY = 88
_SIGNS = {Verdict.PASS: "✓", Verdict.AMBIGUOUS: "≈", Verdict.FAIL: "✗"}
_MEANING = {
    Verdict.PASS: "The bundle answers as the model does, within the tolerances below.",
    Verdict.AMBIGUOUS: "The bundle differs only where the model itself hardly prefers one choice.",
    Verdict.FAIL: "The bundle differs from the model beyond rounding. Do not rely on it.",
}
_TITLES = {
    "positions": "Positions",
    "vision": "Vision encoder",
    "embeddings": "Text embeddings",
    "scores": "Token scores",
    "node": "EntropyPrune node",
    "kept": "Kept tokens",
    "hidden": "Hidden states after pruning",
    "logits": "Logits",
    "kv_full": "KV cache, full layers",
    "kv_kept": "KV cache, pruned layers",
    "tokens": "Generated tokens",
}


def write_html(report: Report, path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write the report.

    Args:
        report: From `validate`.
        path: File to write.
        pictures: The pictures `validate` was given, in the same order.
    """
    body = "\n".join([_head(report), _stages(report.stages), _cases(report.cases, pictures), _about(report)])
    title = html.escape(f"{report.verdict.value}: {report.subject}")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _head(report: Report) -> str:
    verdict = report.verdict
    badge = f'<span class="badge">{_SIGNS[verdict]} {verdict.value}</span>'
    worst = [stage for stage in report.stages if stage.verdict is not Verdict.PASS]
    where = "".join(f"<li><b>{_title(s)}</b>: {html.escape(s.note)}</li>" for s in worst)
    return (
        f'<header class="{verdict.value}"><p class="kicker">Validation against Hugging Face</p>'
        f"<h1>{html.escape(report.subject)}</h1>"
        f'<p class="verdict">{badge} {_MEANING[verdict]}</p>'
        + (f"<ul>{where}</ul>" if where else "")
        + _figures(report)
        + "</header>"
    )


def _figures(report: Report) -> str:
    with_pictures = [case for case in report.cases if case.visual_tokens]
    kept = sum(case.kept_tokens for case in with_pictures)
    visual = sum(case.visual_tokens for case in with_pictures)
    same = sum(case.answer == case.reference_answer for case in report.cases)
    figures = [
        (f"{report.kept_overlap:.2%}", "agreement on which tokens to keep"),
        (f"{same} / {len(report.cases)}", "answers the same"),
        (f"{kept} / {visual}", "visual tokens reach the upper layers"),
    ]
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for value, label in figures)
    return f'<dl class="figures">{items}</dl>'


def _stages(stages: Sequence[Stage]) -> str:
    made = "".join(map(_stage, stages))
    legend = "A bar shows how much of its tolerance a stage uses; below stands why it is allowed that much."
    head = f'<h2>Stage by stage</h2><p class="note">{legend}</p>'
    return f'<section>{head}<ol class="stages">{made}</ol></section>'


def _stage(stage: Stage) -> str:
    used = stage.max_abs_error / stage.tolerance if stage.tolerance > 0 else float(stage.max_abs_error > 0)
    width = 100 * min(used, 1.0) if math.isfinite(used) else 100
    error, allowed = _number(stage.max_abs_error), _number(stage.tolerance)
    counted = f"{stage.comparisons} comparison{'s' if stage.comparisons != 1 else ''}"
    return (
        f'<li class="{stage.verdict.value}"><div class="line"><h3>{_title(stage)}</h3>'
        f'<span class="badge">{_SIGNS[stage.verdict]} {stage.verdict.value}</span></div>'
        f'<div class="bar" role="img" aria-label="{width:.0f} percent of the tolerance used">'
        f'<i style="width:{max(width, 0.6):.1f}%"></i></div>'
        f'<p class="numbers">error <b>{error}</b> · allowed <b>{allowed}</b>'
        f" · relative <b>{_number(stage.relative_error)}</b> · {counted}</p>"
        f'<p class="note">{html.escape(stage.note)}</p>'
        f'<p class="reason">{html.escape(stage.reason)}</p></li>'
    )


def _cases(cases: Sequence[Case], pictures: Sequence[Image.Image]) -> str:
    made = "".join(_case(case, pictures) for case in cases)
    return f'<section><h2>Questions and kept patches</h2><div class="cases">{made}</div></section>'


def _case(case: Case, pictures: Sequence[Image.Image]) -> str:
    shown = "".join(_figure(picture, pictures[picture.picture]) for picture in case.pictures)
    answer = html.escape(case.answer) or "<i>empty</i>"
    same = case.answer == case.reference_answer
    other = "" if same else f"<dt>Model</dt><dd>{html.escape(case.reference_answer) or '<i>empty</i>'}</dd>"
    tokens = f"{case.kept_tokens} of {case.visual_tokens} visual tokens kept, " if case.visual_tokens else ""
    return (
        f'<article><div class="shown">{shown}</div>'
        f'<dl class="qa"><dt>Question</dt><dd>{html.escape(case.prompt)}</dd>'
        f"<dt>{'Answer' if same else 'Bundle'}</dt><dd><b>{answer}</b></dd>{other}</dl>"
        f'<p class="note">{html.escape(case.name)}: {tokens}prompt of {case.prompt_tokens} tokens'
        f"{'' if same else '; the answers differ'}</p></article>"
    )


def _figure(shown: KeptPicture, picture: Image.Image) -> str:
    kept = np.array(shown.kept, dtype=np.bool_)
    drawing = draw_kept(picture, shown.token_grid, kept, view=shown.view)
    caption = f"{int(kept.sum())} of {kept.size} patches kept"
    image = inline_image(drawing, caption, quality=_JPEG_QUALITY)
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _about(report: Report) -> str:
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in report.settings.items()
    )
    return f'<section><h2>What was compared</h2><dl class="settings">{rows}</dl></section>'


def _title(stage: Stage) -> str:
    return html.escape(_TITLES.get(stage.name, stage.name))


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "∞"

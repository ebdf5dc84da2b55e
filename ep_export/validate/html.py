"""The report as one HTML file: `report.html.j2`, and the drawings and figures that go into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ep_export.page import render
from ep_export.planning import Pair
from ep_export.validate.picture import draw_kept
from ep_export.validate.questions import make_clip
from ep_export.validate.report import Case, Report, Stage, Verdict
from ep_export.validate.video_sheet import draw_kept_video

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.runtime import KeptPicture

__all__ = ["write_html"]

_TEMPLATE = "validate/report.html.j2"
_SIGNS = {Verdict.PASS: "✓", Verdict.AMBIGUOUS: "≈", Verdict.FAIL: "✗"}
_MEANING = {
    Verdict.PASS: "The bundle computes what the pruned Hugging Face model does, within the tolerances below.",
    Verdict.AMBIGUOUS: "The bundle differs only where the pruned Hugging Face model itself is undecided.",
    Verdict.FAIL: "The bundle differs from the pruned Hugging Face model beyond rounding. Do not rely on it.",
}
_TITLES = {
    "preprocessing": "Preprocessing",
    "positions": "Positions",
    "vision": "Vision encoder",
    "embeddings": "Text embeddings",
    "scores": "Token scores",
    "node": "Prune component alone",
    "kept": "Kept tokens",
    "hidden": "Hidden states after pruning",
    "logits": "Logits",
    "kv": "KV cache",
    "tokens": "Generated tokens",
}
_HEADER = ("keep", "layers", "policies", "evidence")
"""Settings a reader should see first."""


@dataclass(frozen=True)
class _Figure:
    """A drawing and what it says."""

    drawing: Image.Image
    caption: str


def write_html(report: Report, path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write the report.

    Args:
        report: From `validate`.
        path: File to write.
        pictures: The pictures `validate` was given, in the same order.
    """
    page = render(
        _TEMPLATE,
        report=report,
        meaning=_MEANING[report.verdict],
        signs=_SIGNS,
        settings={name: report.settings[name] for name in _HEADER if name in report.settings},
        others={name: value for name, value in report.settings.items() if name not in _HEADER},
        figures=_numbers(report),
        title=_title,
        used=_used,
        number=_number,
        shown=[(case, list(_figures(case, pictures))) for case in report.cases],
    )
    path.write_text(page, encoding="utf-8")


def _numbers(report: Report) -> dict[str, str]:
    """What the report comes to, most wanted first."""
    cases, pictured = report.cases, [case for case in report.cases if case.visual_tokens]
    numbers = {}
    if pictured:
        alike = sum(case.reference_answer == case.unpruned_answer for case in pictured)
        numbers = {
            "of the FLOPs to the first token saved": _saved([case.first_token_flops for case in pictured]),
            "of the decoder's prefill alone saved": _saved([case.prefill_flops for case in pictured]),
            "pruned answers as without pruning": f"{alike} / {len(pictured)}",
        }
    same = sum(case.answer == case.reference_answer for case in cases)
    return {
        **numbers,
        "bundle's answers as the pruned model's": f"{same} / {len(cases)}",
        "agreement on which tokens to keep": f"{report.kept_overlap:.2%}",
    }


def _saved(flops: Sequence[Pair]) -> str:
    """Over all prompts together."""
    return f"{1 - sum(pair.pruned for pair in flops) / sum(pair.full for pair in flops):.1%}"


def _figures(case: Case, pictures: Sequence[Image.Image]) -> Iterator[_Figure]:
    """What every cut keeps of every picture, and of the clip's parts together."""
    parts = [picture for picture in case.pictures if picture.video is not None]
    shown = [[picture] for picture in case.pictures if picture.video is None]
    for group in [*shown, parts] if parts else shown:
        for cut, masks in enumerate(zip(*(picture.masks for picture in group), strict=True)):
            kept, cells = sum(int(mask.sum()) for mask in masks), sum(mask.size for mask in masks)
            where = f"cut {cut}: " if len(group[0].masks) > 1 else ""
            yield _Figure(_draw(group, cut, pictures), f"{where}{kept} of {cells} patches kept")


def _draw(group: Sequence[KeptPicture], cut: int, pictures: Sequence[Image.Image]) -> Image.Image:
    first = group[0]
    if first.video is not None or first.picture is None:
        return draw_kept_video(make_clip(), group, cut=cut)
    return draw_kept(pictures[first.picture], first.token_grid, first.masks[cut], view=first.view)


def _title(stage: Stage) -> str:
    """A stage's name for people: `kept_1` is "Kept tokens, cut 1"."""
    name, _, number = stage.name.partition("_")
    title = _TITLES.get(name, stage.name)
    if not number.isdigit() or name not in _TITLES:
        return title
    return f"{title}, {'span' if name == 'kv' else 'cut'} {int(number)}"


def _used(stage: Stage) -> float:
    """Percent of its tolerance that a stage uses, at most 100."""
    used = stage.max_abs_error / stage.tolerance if stage.tolerance > 0 else float(stage.max_abs_error > 0)
    return 100 * min(used, 1.0) if math.isfinite(used) else 100.0


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "∞"

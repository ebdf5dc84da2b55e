"""A sweep's curves: one small panel a layer or keep, so that a page can lay them out on a phone.

Panels leave as SVG that takes its ink from the page (light or dark) and together as one PNG.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ep_export.calibrate.figure import draw_entropy, hue_of
from ep_export.policy import ADAPTIVE, Select
from ep_export.sweep.record import RANDOM, RECOMMENDED, SCHEDULE, MethodInfo, Row, SweepRecord
from ep_export.sweep.shortlist import charted

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Look",
    "Panel",
    "drawn_methods",
    "entropy_panel",
    "first_panels",
    "layer_panels",
    "look_of",
    "save_png",
    "svg",
]

_INK, _LINE = "#161d29", "#dfe3ea"  # replaced by the page's own in SVG
_SIZE = (4.5, 3.3)  # inches: readable at the width of a phone
_LEAST_RANGE = 10.0  # percent: where all ways cost the same
_ASIDE = 0.03
"""Points of a keep stand apart by that part of the axis, or their intervals would cover each other."""
_NEAR = 0.15
"""Ways that lose less than this to the best are near it."""
_HUES = {
    "norm-highest-attention": "#b3261e",
    "coverage-norm-highest-attention": "#7f1d1d",
    "dart": "#a16207",
    "cdpruner": "#0ea5e9",
    "scope": "#0f766e",
    "visionzip": "#65a30d",
    "pyramiddrop": "#9a3412",
    "sparsevlm": "#be185d",
    "horizon": "#4338ca",
    "scaled": "#78716c",
    "scaled-flops": "#15803d",
    ADAPTIVE: "#c026d3",
    RANDOM: "#8a8f98",
    RECOMMENDED: "#e0218a",
    SCHEDULE: "#f59e0b",
}
_OTHER_HUE = "#9d174d"
_MARKS = {
    "norm-highest-attention": "s",
    "divprune": "D",
    "dart": "^",
    "cdpruner": "v",
    "scope": "<",
    "pyramiddrop": ">",
    "sparsevlm": "h",
    "horizon": "X",
    "scaled": "d",
    "scaled-flops": "p",
    RECOMMENDED: "*",
    ADAPTIVE: "H",
    SCHEDULE: "P",
}
_GLYPHS = {"": "━", **dict(zip("osDd^v<>hHpXP*", "●■◆♦▲▼◀▶⬢⬣⬟✖✚★", strict=True))}
_STRONG = frozenset({RECOMMENDED, ADAPTIVE, SCHEDULE, RANDOM})


@dataclass(frozen=True)
class Look:
    """How a method is drawn everywhere.

    Attributes:
        colour: Of line and mark.
        dashed: Methods that keep the lowest scores.
        mark: matplotlib marker; none for the floor.
        width: Of the line, in points.
    """

    colour: str
    dashed: bool
    mark: str
    width: float

    @property
    def glyph(self) -> str:
        """The mark as a character, for legends in text."""
        return "○" if self.dashed and self.mark == "o" else _GLYPHS[self.mark]

    @property
    def line(self) -> dict[str, Any]:
        """As matplotlib takes it."""
        face = "none" if self.dashed else self.colour
        style = {"linestyle": "--" if self.dashed else "-", "marker": self.mark, "markerfacecolor": face}
        return {"color": self.colour, "linewidth": self.width, **style}


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: Above it.
        about: What it shows, for those who cannot see it.
        draw: Draws on matplotlib axes.
    """

    title: str
    about: str
    draw: Callable[[Any], None]


def look_of(method: str) -> Look:
    """The method's colour and line, the same on every panel."""
    mark = "" if method == RANDOM else _MARKS.get(method, "o")
    colour = _HUES.get(method) or hue_of(method) or _OTHER_HUE
    return Look(colour, method.endswith(f"-{Select.LOWEST.value}"), mark, 2.4 if method in _STRONG else 1.5)


def drawn_methods(record: SweepRecord) -> list[MethodInfo]:
    """Methods on full weights: with the rounded ones beside them nobody would see a line."""
    rounded = {row.method for row in record.rows if row.weights is not None}
    return [method for method in record.methods if method.key not in rounded]


def first_panels(record: SweepRecord) -> tuple[Panel, ...]:
    """Accuracy (or agreement) with intervals against FLOPs up to the first token, of the ways shown first.

    Where ways lie far apart there is a second panel, of those near the best.
    """
    curves = charted(record)
    values = [row.measure.value for rows in curves.values() for row in rows]
    title, about = (
        f"{_what(record)} against FLOPs up to the first token",
        "with 95% intervals, a point a keep",
    )
    panels = [Panel(title, f"{title}, {about}", partial(_draw_first, record=record, curves=curves))]
    near = {
        method: tuple(row for row in rows if row.measure.value >= max(values) - _NEAR)
        for method, rows in curves.items()
    }
    if max(values) - min(values) > 2 * _NEAR:
        draw = partial(_draw_first, record=record, curves={m: rows for m, rows in near.items() if rows})
        panels.append(Panel("the same, near the best", f"{title}, those near the best, {about}", draw))
    return tuple(panels)


def layer_panels(record: SweepRecord) -> tuple[Panel, ...]:
    """The ablation over layers (the paper's Fig. 5), a panel for each keep."""
    return tuple(
        Panel(
            title=f"keep {keep:g}",
            about=f"{_what(record)} by the layer before which tokens are pruned, at keep {keep:g}",
            draw=partial(_draw_layers, record=record, keep=keep),
        )
        for keep in record.keeps
    )


def entropy_panel(record: SweepRecord) -> Panel:
    """Entropy of the visual tokens by layer, the collapse marked where there is one."""
    return Panel(
        title="entropy of the visual tokens by layer",
        about=f"matrix entropy of queries and keys by layer; {record.entropies.finding}",
        draw=partial(_draw_entropy, record=record),
    )


def svg(panel: Panel) -> str:
    """The panel as an SVG element whose ink is the page's."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text: it is searched, scaled and read aloud with the page.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title, **_rc()}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)  # no pyplot: no window system and no global state
        panel.draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # Ids repeat from figure to figure; a page holds many.
    salt = re.sub(r"\W", "", panel.about)[-40:]
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="{salt}-\1"', drawn)
    drawn = re.sub(r"url\(#([^)]+)\)", rf"url(#{salt}-\1)", drawn)
    drawn = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{salt}-\1"', drawn)
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    return drawn.replace(_INK, "currentColor").replace(_LINE, "var(--line)")


def save_png(record: SweepRecord, path: Path) -> None:
    """All panels and the legend as one picture, aside first and then renamed."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = [(*first_panels(record), entropy_panel(record)), layer_panels(record)]
    columns = max(map(len, lines))
    size = (_SIZE[0] * columns, (_SIZE[1] + 0.4) * len(lines))
    with mpl.rc_context(_rc()):
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(lines), columns, squeeze=False)
        for line, panels in zip(grid, lines, strict=True):
            for axes, panel in zip(line, panels, strict=False):
                panel.draw(axes)
                axes.set_title(panel.title, fontsize=10, loc="left")
            for axes in line[len(panels) :]:
                axes.set_axis_off()
        handles = [Line2D([], [], label=m.title, **look_of(m.key).line) for m in drawn_methods(record)]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns + 1, frameon=False)
        aside = path.with_name(f".{path.name}.part")
        try:
            figure.savefig(aside, format="png", facecolor="white")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _rc() -> dict[str, Any]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    return {**ink, "axes.edgecolor": _INK, "font.family": "sans-serif", "font.size": 10.5}


def _what(record: SweepRecord) -> str:
    return "exact answers" if record.dataset.answers else "agreement with the unpruned model"


def _draw_first(axes: Any, record: SweepRecord, curves: Mapping[str, Sequence[Row]]) -> None:
    every = [row for rows in curves.values() for row in rows]
    aside = dict(zip(map(id, every), _apart([_first_token_share(record, row) for row in every]), strict=True))
    for method, rows in curves.items():
        look = look_of(method)
        x = [aside[id(row)] for row in rows]
        y, low, high = ([100 * getattr(row.measure, end) for row in rows] for end in ("value", "low", "high"))
        front = 5 if method == RECOMMENDED else 3
        axes.vlines(x, low, high, color=look.colour, linewidth=1.6, alpha=0.55, zorder=front)
        line = {**look.line, "linestyle": "", "marker": look.mark or "_"}
        axes.plot(x, y, markersize=11 if look.mark == "*" else 5.5, zorder=front, **line)
    axes.margins(x=0.1)
    axes.set_xlabel("FLOPs up to the first token, % of unpruned")
    _finish(axes, record, bottom=10 * (100 * min(row.measure.low for row in every) // 10))


def _first_token_share(record: SweepRecord, row: Row) -> float:
    """In percent of the unpruned model."""
    return 100 * row.first_token_flops / record.unpruned.first_token_flops


def _apart(values: Sequence[float]) -> list[float]:
    """Values a step or more apart: the mean of where pushing right and pushing left moves them."""
    order = sorted(range(len(values)), key=values.__getitem__)
    step = _ASIDE * max(max(values) - min(values), _LEAST_RANGE)
    moved = [0.0] * len(values)
    for sign in (1, -1):
        last = -math.inf
        for place in order[::sign]:
            last = max(sign * values[place], last + step)
            moved[place] += sign * last / 2
    return moved


def _draw_layers(axes: Any, record: SweepRecord, keep: float) -> None:
    for method in drawn_methods(record):
        rows = [row for row in record.rows if (row.method, row.keep) == (method.key, keep)]
        rows.sort(key=lambda row: row.layer)
        _curve(axes, method.key, [row.layer for row in rows], rows)
    axes.set_xticks(record.swept_layers)
    axes.set_xlabel("pruned before layer")
    _finish(axes, record)


def _curve(axes: Any, method: str, x: Sequence[float], rows: Sequence[Row]) -> None:
    if not rows:
        return
    look = look_of(method)
    line = {**look.line, "marker": look.mark or ("" if len(rows) > 1 else "_")}
    size, front = (11 if look.mark == "*" else 4.5), (5 if method in {RECOMMENDED, SCHEDULE} else 3)
    axes.plot(x, [100 * row.measure.value for row in rows], markersize=size, zorder=front, **line)
    if method not in {RANDOM, RECOMMENDED}:  # intervals of the two that everything is compared with
        return
    low, high = ([100 * getattr(row.measure, end) for row in rows] for end in ("low", "high"))
    if len(rows) > 1:
        axes.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
    else:
        axes.vlines(x, low, high, color=look.colour, linewidth=3, alpha=0.3)


def _finish(axes: Any, record: SweepRecord, *, bottom: float = 0.0) -> None:
    """The unpruned model's level, one scale for all panels, and nothing that is not needed."""
    full = record.unpruned.accuracy
    axes.axhline(100 * full.value if full is not None else 100.0, color=_INK, linewidth=1, linestyle=":")
    axes.set_ylim(bottom=max(0.0, bottom), top=103 - 0.03 * bottom)
    axes.set_ylabel(f"{_what(record)}, %", fontsize=9.5)
    _bare(axes)


def _draw_entropy(axes: Any, record: SweepRecord) -> None:
    curves = record.entropies
    queries, keys = (curves.query, curves.query_spread), (curves.key, curves.key_spread)
    draw_entropy(axes, queries, keys, curves.collapse, label=f"collapse at layer {curves.collapse}", ink=_INK)
    axes.set_ylabel("nats", fontsize=9.5)
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)

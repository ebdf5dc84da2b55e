"""A sweep's curves: one small panel a layer or keep, so that a page can lay them out on a phone.

Panels leave as SVG that takes its ink from the page (light or dark) and together as one PNG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ep_export.calibrate.figure import draw_entropy
from ep_export.sweep.findings import RANDOM, RECOMMENDED, measure_of
from ep_export.sweep.record import Row, SweepRecord

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Look", "Panel", "entropy_panel", "flops_panels", "layer_panels", "look_of", "save_png", "svg"]

_INK, _LINE = "#161d29", "#dfe3ea"  # replaced by the page's own in SVG
_SIZE = (4.5, 3.3)  # inches: readable at the width of a phone
_HUES = {
    "paper": "#1f5fa8",
    "released": "#7a4fa3",
    "order2": "#2f8f83",
    "norm": "#d0662a",
    "fastv": "#b3261e",
    "divprune": "#4d7c0f",
    "dart": "#a16207",
    "cdpruner": "#0ea5e9",
    RANDOM: "#8a8f98",
    RECOMMENDED: "#e0218a",
}
_SPARE = ("#9d174d", "#3f6212", "#1e40af", "#92400e")
_MARKS = {"fastv": "s", "divprune": "D", "dart": "^", "cdpruner": "v", RECOMMENDED: "*", RANDOM: ""}


@dataclass(frozen=True)
class Look:
    """How a method is drawn everywhere.

    Attributes:
        colour: Of line and mark.
        dashed: Methods that keep the lowest scores.
        mark: matplotlib marker.
        width: Of the line, in points.
    """

    colour: str
    dashed: bool
    mark: str
    width: float


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


def look_of(record: SweepRecord, method: str) -> Look:
    """The method's colour and line, the same on every panel."""
    base = re.sub(r"-(highest|lowest)$", "", method)
    unknown = [key for key in (m.key for m in record.methods) if key not in _HUES and "-" not in key]
    hue = _HUES.get(base) or _SPARE[unknown.index(method) % len(_SPARE) if method in unknown else 0]
    strong = method in {RECOMMENDED, RANDOM}
    return Look(hue, method.endswith("-lowest"), _MARKS.get(base, "o"), 2.4 if strong else 1.5)


def flops_panels(record: SweepRecord) -> tuple[Panel, ...]:
    """Accuracy (or agreement) against prefill FLOPs, a panel for each layer at which tokens were pruned."""
    return tuple(
        Panel(
            title=f"pruned before layer {layer}" if layer else "pruned before the decoder",
            about=f"{_what(record)} against decoder FLOPs for every method pruned before layer {layer}",
            draw=partial(_draw_flops, record=record, layer=layer),
        )
        for layer in record.swept_layers
    )


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

    # Text stays text: it is searched, scaled and read aloud with the page.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title, **_rc()}):
        figure, axes = _figure()
        panel.draw(axes)
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

    rows = [flops_panels(record), layer_panels(record), (entropy_panel(record),)]
    columns = max(map(len, rows))
    with mpl.rc_context(_rc()):
        figure = Figure(
            figsize=(_SIZE[0] * columns, (_SIZE[1] + 0.4) * len(rows)), dpi=110, layout="constrained"
        )
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for line, panels in zip(grid, rows, strict=True):
            for axes, panel in zip(line, panels, strict=False):
                panel.draw(axes)
                axes.set_title(panel.title, fontsize=10, loc="left")
            for axes in line[len(panels) :]:
                axes.set_axis_off()
        handles = [_handle(record, method.key, method.title) for method in record.methods]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
        aside = path.with_name(f".{path.name}.part")
        figure.savefig(aside, format="png", facecolor="white")
    aside.replace(path)


def _rc() -> dict[str, Any]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    return {**ink, "axes.edgecolor": _INK, "font.family": "sans-serif", "font.size": 10.5}


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)  # no pyplot: no window system and no global state
    return figure, figure.subplots()


def _what(record: SweepRecord) -> str:
    return "exact answers" if record.dataset.answers else "agreement with the unpruned model"


def _draw_flops(axes: Any, record: SweepRecord, layer: int) -> None:
    full = record.unpruned.flops
    for method in record.methods:
        rows = [row for row in record.rows if (row.method, row.layer) == (method.key, layer)]
        rows.sort(key=lambda row: row.flops)
        _curve(axes, record, method.key, [100 * row.flops / full for row in rows], rows)
    _full_line(axes, record)
    axes.set_xlim(0, 104)  # one scale for all panels
    axes.set_xlabel("decoder FLOPs, % of unpruned")
    axes.set_ylabel(f"{_what(record)}, %", fontsize=9.5)
    _bare(axes)


def _draw_layers(axes: Any, record: SweepRecord, keep: float) -> None:
    for method in record.methods:
        rows = [row for row in record.rows if (row.method, row.keep) == (method.key, keep)]
        rows.sort(key=lambda row: row.layer)
        _curve(axes, record, method.key, [row.layer for row in rows], rows)
    _full_line(axes, record)
    axes.set_xticks(record.swept_layers)
    axes.set_xlabel("pruned before layer")
    axes.set_ylabel(f"{_what(record)}, %", fontsize=9.5)
    _bare(axes)


def _curve(axes: Any, record: SweepRecord, method: str, x: Sequence[float], rows: Sequence[Row]) -> None:
    if not rows:
        return
    look = look_of(record, method)
    estimates = [measure_of(record, row) for row in rows]
    axes.plot(
        x,
        [100 * estimate.value for estimate in estimates],
        color=look.colour,
        linestyle="--" if look.dashed else "-",
        linewidth=look.width,
        marker=look.mark or ("" if len(rows) > 1 else "_"),
        markersize=11 if look.mark == "*" else 4.5,
        markerfacecolor="none" if look.dashed else look.colour,
        zorder=5 if method == RECOMMENDED else 3,
    )
    if method in {RANDOM, RECOMMENDED}:  # intervals of the two that everything is compared with
        low, high = ([100 * getattr(e, end) for e in estimates] for end in ("low", "high"))
        if len(rows) > 1:
            axes.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
        else:
            axes.vlines(x, low, high, color=look.colour, linewidth=3, alpha=0.3)


def _full_line(axes: Any, record: SweepRecord) -> None:
    full = record.unpruned.accuracy
    level = 100 * full.value if full is not None else 100.0
    axes.axhline(level, color=_INK, linewidth=1, linestyle=":")
    axes.set_ylim(bottom=0, top=103)


def _draw_entropy(axes: Any, record: SweepRecord) -> None:
    found = record.entropies
    queries, keys = (found.query, found.query_spread), (found.key, found.key_spread)
    draw_entropy(axes, queries, keys, found.collapse, label=f"collapse at layer {found.collapse}", ink=_INK)
    axes.set_ylabel("nats", fontsize=9.5)
    _bare(axes)


def _handle(record: SweepRecord, method: str, title: str) -> Any:
    from matplotlib.lines import Line2D

    look = look_of(record, method)
    return Line2D(
        [],
        [],
        color=look.colour,
        linestyle="--" if look.dashed else "-",
        linewidth=look.width,
        marker=look.mark,
        markerfacecolor="none" if look.dashed else look.colour,
        label=title,
    )


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)

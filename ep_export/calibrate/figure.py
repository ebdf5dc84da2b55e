"""The record as a picture: entropies and metrics by layer, the information horizon, schedules compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ep_export.aliases import short_name
from ep_export.calibrate.figure_panels import (
    HUES,
    MARK,
    draw_candidates,
    draw_horizon,
    draw_metrics,
    entitle,
    hue_of,
)
from ep_export.calibrate.record import Record

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["HUES", "draw_entropy", "hue_of", "is_our_plot", "plot"]

_Curve: TypeAlias = tuple[Sequence[float], Sequence[float]]

_QUERY, _KEY = "#1f5fa8", "#c4622d"
_SOFTWARE = "ep-export calibrate"  # in the PNG's own metadata: whose it is


def plot(record: Record, path: Path) -> None:
    """Write a PNG, aside first and then renamed: a panel for everything that the record measured.

    Args:
        record: A measured record.
        path: The picture to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels: list[Callable[[Any, Record], None]] = [_draw_entropy]
    panels += [draw_metrics] if record.metrics else []
    panels += [draw_horizon] if record.horizon is not None else []
    panels += [draw_candidates] if record.candidates else []
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    figure = Figure(figsize=(7.2 * columns, 5.4 * rows), dpi=130, layout=layout)
    FigureCanvasAgg(figure)  # no pyplot: no window system and no global state
    grid = figure.add_gridspec(rows, columns)
    for number, draw in enumerate(panels):
        last = number == len(panels) - 1 and len(panels) % columns
        where = grid[number // columns, :] if last else grid[number // columns, number % columns]
        axes = figure.add_subplot(where)
        draw(axes, record)
        _bare(axes)
    keep = f", keep {record.keep}" if record.keep is not None else ""
    figure.suptitle(
        f"{short_name(record.model)}: {record.images} pictures{keep}", fontsize=13, fontweight="bold"
    )
    aside = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(aside, format="png", metadata={"Software": _SOFTWARE})
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def is_our_plot(path: Path) -> bool:
    """Whether `plot` wrote a file."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get("Software") == _SOFTWARE
    except (OSError, SyntaxError, ValueError):  # what Pillow raises on what is no picture
        return False


def draw_entropy(
    axes: Any, queries: _Curve, keys: _Curve, collapse: int | None, *, label: str, ink: str = MARK
) -> None:
    """Entropy of the visual tokens by layer, the collapse marked where there is one.

    Args:
        axes: matplotlib axes.
        queries: [L] mean over pictures and [L] standard deviation, in nats; either may be empty.
        keys: The same of the keys.
        collapse: The Entropy Collapse Layer, if there is one.
        label: What stands beside its mark.
        ink: Colour of the mark.
    """
    for name, (mean, spread), colour, marker in (
        ("queries", queries, _QUERY, "o"),
        ("keys", keys, _KEY, "s"),
    ):
        if not mean:
            continue
        layers = range(len(mean))
        axes.plot(layers, mean, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=name)
        if spread:
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    if collapse is not None:
        axes.axvline(collapse, color=ink, linestyle="--", linewidth=1.3)
        axes.annotate(
            label,
            (collapse, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            va="top",
            fontsize=9,
        )
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="best", fontsize=9.5)


def _draw_entropy(axes: Any, record: Record) -> None:
    queries, keys = (record.query_entropy, record.query_spread), (record.key_entropy, record.key_spread)
    label = f"collapse at layer {record.ecl}\n({record.confidence or 0:.0%} of resamples)"
    draw_entropy(axes, queries, keys, record.ecl, label=label)
    entitle(axes, "entropy of the visual tokens by layer", record.collapse_finding)
    axes.set_ylabel("nats (band: one standard deviation over pictures)")


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)

"""The record as a picture: where entropy collapses (or not), and how faithful each way of pruning is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ep_export.aliases import short_name
from ep_export.calibrate.record import RANDOM, Candidate, Record
from ep_export.policy import MaxMin, Select

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["HUES", "draw_entropy", "hue_of", "is_our_plot", "plot"]

_Curve: TypeAlias = tuple[Sequence[float], Sequence[float]]

_QUERY, _KEY, _MARK = "#1f5fa8", "#c4622d", "#2a2a2a"
_FLOOR = "#8a8a8a"
_SPREAD = 0.09  # between neighbouring marks of a layer
_SOFTWARE = "ep-export calibrate"  # in the PNG's own metadata: whose it is

HUES = {
    "paper": "#1f5fa8",
    "released": "#7a4fa3",
    "order2": "#2f8f83",
    "norm": "#c4622d",
    MaxMin().name: "#4d7c0f",
}
"""Colour of every score, and of choosers without one; both ends of a score share it."""


def plot(record: Record, path: Path) -> None:
    """Write a PNG, aside first and then renamed: entropy by layer, and the candidates where there are any.

    Args:
        record: A measured record.
        path: The picture to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 + bool(record.candidates)
    figure = Figure(figsize=(6.6 * panels, 4.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no window system and no global state
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_entropy(axes[0], record)
    if record.candidates:
        _draw_candidates(axes[1], record)
    keep = f", keep {record.keep}" if record.keep is not None else ""
    figure.suptitle(
        f"{short_name(record.model)}: {record.images} pictures{keep}", fontsize=12.5, fontweight="bold"
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
    axes: Any, queries: _Curve, keys: _Curve, collapse: int | None, *, label: str, ink: str = _MARK
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
    title = "entropy of the visual tokens by layer"
    note = textwrap.fill(record.collapse_finding, 72)
    axes.set_title(f"{title}\n{note}" if note else title, fontsize=9.5, loc="left")
    axes.set_ylabel("nats (band: one standard deviation over pictures)")
    _bare(axes)


def hue_of(policy: str) -> str | None:
    """The colour of a policy; None for one without."""
    return HUES.get(_score(policy))


def _score(policy: str) -> str:
    """A policy's name without the end of the scores it keeps."""
    return policy.removesuffix(f"-{Select.HIGHEST.value}").removesuffix(f"-{Select.LOWEST.value}")


def _draw_candidates(axes: Any, record: Record) -> None:
    """KL by layer: a group of marks for each layer, filled for highest and open for lowest."""
    layers = sorted({candidate.layer for candidate in record.candidates})
    names = list(dict.fromkeys(c.policy for c in record.candidates if c.policy != RANDOM))
    offsets = {name: (i - (len(names) - 1) / 2) * _SPREAD for i, name in enumerate(names)}
    best = record.recommended.cuts[0] if record.recommended is not None else None
    for candidate in record.candidates:
        at = layers.index(candidate.layer)
        if candidate.policy == RANDOM:
            _draw_floor(axes, at, candidate)
            continue
        _draw_mark(axes, at + offsets[candidate.policy], candidate)
        if best is not None and candidate.is_cut(best):
            ring = {"markerfacecolor": "none", "color": _MARK, "markeredgewidth": 1.6}
            axes.plot(at + offsets[candidate.policy], candidate.kl, "o", markersize=14, **ring)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    if all((candidate.kl_low or 0) > 0 for candidate in record.candidates):
        axes.set_yscale("log")
    axes.set_xlabel("pruned before layer")
    axes.set_ylabel("KL per answer token, nats (bars: 95% interval)")
    note = textwrap.fill(record.recommendation, 72)
    axes.set_title(f"fidelity to the unpruned model, lower is better\n{note}", fontsize=9.5, loc="left")
    _draw_legend(axes, names, recommended=best is not None)
    _bare(axes)


def _interval(candidate: Candidate) -> tuple[float, float]:
    return candidate.kl_low or candidate.kl, candidate.kl_high or candidate.kl


def _draw_floor(axes: Any, at: float, candidate: Candidate) -> None:
    low, high = _interval(candidate)
    axes.fill_between([at - 0.44, at + 0.44], low, high, color=_FLOOR, alpha=0.25, linewidth=0)
    axes.hlines(candidate.kl, at - 0.44, at + 0.44, color=_FLOOR, linewidth=1.4)


def _draw_mark(axes: Any, x: float, candidate: Candidate) -> None:
    low, high = _interval(candidate)
    colour = hue_of(candidate.policy) or _MARK
    face = "white" if candidate.policy.endswith(Select.LOWEST.value) else colour
    axes.vlines(x, low, high, color=colour, linewidth=1.4, alpha=0.7)
    axes.plot(x, candidate.kl, "o", color=colour, markerfacecolor=face, markersize=6)


def _draw_legend(axes: Any, names: Sequence[str], *, recommended: bool) -> None:
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"marker": "o", "linestyle": ""}
    scores = dict.fromkeys(map(_score, names))
    handles = [Line2D([], [], color=HUES.get(score, _MARK), label=score, **dot) for score in scores]
    handles += [
        Line2D([], [], color=_MARK, markerfacecolor="white", label="open: lowest kept", **dot),
        Line2D([], [], color=_FLOOR, linewidth=4, alpha=0.5, label="random tokens"),
    ]
    if recommended:
        ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "color": _MARK}
        handles.append(Line2D([], [], label="recommended", **ring, **dot))
    axes.legend(
        handles=handles, frameon=False, fontsize=8.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13)
    )


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)

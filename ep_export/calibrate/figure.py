"""The record as a picture: where entropy collapses (or not), and how faithful each way of pruning is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ep_export.aliases import short_name
from ep_export.calibrate.record import RANDOM, Record
from ep_export.policy import Select

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["draw_entropy", "plot"]

_Curve: TypeAlias = tuple[Sequence[float], Sequence[float]]

_QUERY, _KEY, _MARK = "#1f5fa8", "#c4622d", "#2a2a2a"
_SCORERS = {"paper": "#1f5fa8", "released": "#7a4fa3", "order2": "#2f8f83", "norm": "#c4622d"}
_FLOOR = "#8a8a8a"


def plot(record: Record, path: Path) -> None:
    """Write a PNG, aside first and then renamed: entropy by layer, and the candidates where there are any.

    Args:
        record: A measured record.
        path: The .png to write.
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
    figure.savefig(aside, format="png")
    aside.replace(path)


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


def _draw_candidates(axes: Any, record: Record) -> None:
    """KL by layer: a group of marks for each layer, filled for highest and open for lowest."""
    from matplotlib.lines import Line2D

    layers = sorted({candidate.layer for candidate in record.candidates})
    offsets = {
        (scorer, select): (2 * i + j - 3.5) * 0.09
        for i, scorer in enumerate(_SCORERS)
        for j, select in enumerate(Select)
    }
    for candidate in record.candidates:
        at = layers.index(candidate.layer)
        low, high = candidate.kl_low or candidate.kl, candidate.kl_high or candidate.kl
        if candidate.scorer == RANDOM:
            axes.fill_between([at - 0.44, at + 0.44], low, high, color=_FLOOR, alpha=0.25, linewidth=0)
            axes.hlines(candidate.kl, at - 0.44, at + 0.44, color=_FLOOR, linewidth=1.4)
            continue
        colour = _SCORERS[candidate.scorer]
        x = at + offsets[candidate.scorer, candidate.select or Select.HIGHEST]
        axes.vlines(x, low, high, color=colour, linewidth=1.4, alpha=0.7)
        face = colour if candidate.select is Select.HIGHEST else "white"
        axes.plot(x, candidate.kl, "o", color=colour, markerfacecolor=face, markersize=6)
        if record.recommended is not None and candidate.is_policy(record.recommended):
            axes.plot(
                x, candidate.kl, "o", markersize=14, markerfacecolor="none", color=_MARK, markeredgewidth=1.6
            )
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    if all((candidate.kl_low or 0) > 0 for candidate in record.candidates):
        axes.set_yscale("log")
    axes.set_xlabel("pruned before layer")
    axes.set_ylabel("KL per answer token, nats (bars: 95% interval)")
    note = textwrap.fill(record.recommendation, 72)
    axes.set_title(f"fidelity to the unpruned model, lower is better\n{note}", fontsize=9.5, loc="left")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for name, colour in _SCORERS.items()
    ]
    handles += [
        Line2D(
            [], [], marker="o", linestyle="", color=_MARK, markerfacecolor="white", label="open: lowest kept"
        ),
        Line2D([], [], color=_FLOOR, linewidth=4, alpha=0.5, label="random tokens"),
    ]
    if record.recommended is not None:
        ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "color": _MARK}
        handles.append(Line2D([], [], linestyle="", label="recommended", **ring))
    axes.legend(
        handles=handles, frameon=False, fontsize=8.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13)
    )
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)

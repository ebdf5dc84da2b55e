"""Panels of the calibration's figure: metrics by layer, the information horizon, schedules compared."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ep_export.calibrate.horizon import MIN_IMAGES, NOISE_KL
from ep_export.calibrate.record import RANDOM, Candidate, Record
from ep_export.policy import Coverage, MaxMin, Nothing, Scorer, Select

if TYPE_CHECKING:
    from ep_export.calibrate.horizon import DropCurve

__all__ = ["HUES", "MARK", "draw_candidates", "draw_horizon", "draw_metrics", "entitle", "hue_of"]

MARK = "#2a2a2a"
"""Ink of what stands out: the collapse, the horizon, the recommendation."""

_FLOOR = "#8a8a8a"
_SPREAD = 0.88  # of a layer's place that its marks take
_PALE = 0.3  # of schedules that fell out of the race
_SIDES = {"o": -0.28, "v": 0.0, "^": 0.28}  # of a policy's place: marks by their shape, see `_shape`
_LEAST = 1e-5  # nats: below it a logarithmic axis shows rounding

HUES = {
    "paper": "#1f5fa8",
    "released": "#7a4fa3",
    "order2": "#2f8f83",
    "norm": "#c4622d",
    MaxMin().name: "#4d7c0f",
    Coverage(Scorer.PAPER).name.removesuffix(f"-{Select.HIGHEST.value}"): "#38a3d1",
    Coverage(Scorer.NORM).name.removesuffix(f"-{Select.HIGHEST.value}"): "#d19a1c",
}
"""Colour of every score, and of choosers without one; both ends of a score share it."""

_METRIC_HUES = {"truncated": "#1f5fa8", "vendi": "#4d7c0f", "nuclear": "#c4622d", "schur": "#7a4fa3"}


def hue_of(policy: str) -> str | None:
    """The colour of a policy; None for one without."""
    return HUES.get(_score(policy))


def entitle(axes: Any, title: str, note: str) -> None:
    """A panel's title, with the record's own sentence below it."""
    wide = axes.get_subplotspec().colspan.stop - axes.get_subplotspec().colspan.start > 1
    text = f"{title}\n{textwrap.fill(note, 190 if wide else 90)}" if note else title
    axes.set_title(text, fontsize=9.5, loc="left")


def draw_metrics(axes: Any, record: Record) -> None:
    """Every metric as a share of its largest value; its own numbers stand in the legend."""
    from ep_export.entropy import METRICS, VENDI

    known = {metric.key: metric for metric in METRICS}
    for curve in record.metrics:
        largest = max(curve.values) or 1.0
        colour = _METRIC_HUES.get(curve.metric, _FLOOR)
        metric = known.get(curve.metric)
        first, last = f"{curve.values[0]:.3g}", f"{curve.values[-1]:.3g}"
        title = f"{metric.title}, {first} to {last} {metric.unit}".strip() if metric else curve.metric
        if metric is VENDI and record.visual_tokens:
            title = f"{metric.title}: {record.visual_tokens:.0f} tokens, worth {first} to {last}"
        shares = [value / largest for value in curve.values]
        line = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.7}
        axes.plot(range(len(shares)), shares, label=title, **line)
        if curve.collapse is not None:
            ring = {"markerfacecolor": "none", "color": MARK, "markeredgewidth": 1.5, "markersize": 12}
            axes.plot(curve.collapse, shares[curve.collapse], "o", **ring)
    axes.set_ylim(0, None)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the largest (ring: a collapse)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="best", fontsize=8.5)
    entitle(axes, "other metrics of the visual tokens", record.detectors)


def draw_horizon(axes: Any, record: Record) -> None:
    """What dropping visual tokens before a layer costs, the noise, and the first layer within it."""
    horizon = record.horizon
    if horizon is None:
        return
    axes.axhspan(_LEAST, NOISE_KL, color=_FLOOR, alpha=0.13, linewidth=0, label=f"noise, {NOISE_KL:g} nats")
    for curve, label, colour in (
        (horizon.everything, "all dropped", "#a3282f"),
        (horizon.half, "half dropped at random", "#1f5fa8"),
    ):
        _draw_drop(axes, curve, label, colour)
    if horizon.layer is not None:
        axes.axvline(horizon.layer, color=MARK, linestyle="--", linewidth=1.3, label="horizon")
    axes.set_yscale("log")
    axes.set_ylim(0.6 * _LEAST, None)
    axes.set_xlabel("dropped before layer")
    axes.set_ylabel("KL per answer token, nats (band: to the 95% interval's end)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    sure = [one for one in record.horizons if one.images >= MIN_IMAGES]
    kinds = ", ".join(f"{one.kind} {one.layer or 'none'}" for one in sure)
    by_kind = f"; by kind of question: {kinds}" if kinds else ""
    entitle(axes, "information horizon", f"{horizon.finding}{by_kind}")


def draw_candidates(axes: Any, record: Record) -> None:
    """KL by first layer: a group of marks for each, filled for highest and open for lowest."""
    layers = sorted({candidate.layer for candidate in record.candidates})
    names = list(dict.fromkeys(c.policy for c in record.candidates if c.policy != RANDOM))
    step = _SPREAD / max(1, len(names))
    offsets = {name: (i - (len(names) - 1) / 2) * step for i, name in enumerate(names)}
    best = record.candidate_for(record.recommended) if record.recommended is not None else None
    for candidate in sorted(record.candidates, key=lambda c: c.images or record.images):
        at = layers.index(candidate.layer)
        if candidate.policy == RANDOM:
            _draw_floor(axes, at, candidate)
            continue
        pale = (candidate.images or record.images) < record.images
        place = at + offsets[candidate.policy] + _SIDES[_shape(candidate)] * step
        _draw_mark(axes, place, candidate, alpha=_PALE if pale else 1.0)
        if candidate is best:
            ring = {"markerfacecolor": "none", "color": MARK, "markeredgewidth": 1.8}
            axes.plot(place, candidate.kl, "o", markersize=15, **ring)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    if all((candidate.kl_low or 0) > 0 for candidate in record.candidates):
        axes.set_yscale("log")
    axes.set_xlabel("first pruned before layer")
    axes.set_ylabel("KL per answer token, nats (bars: 95% interval)")
    first, _, _ = record.recommendation.partition("; ")  # how sure that is, the command and the record say
    entitle(axes, "fidelity to the unpruned model, lower is better", first)
    _draw_legend(axes, names, record, recommended=best is not None)


def _score(policy: str) -> str:
    """A policy's name without the end of the scores it keeps."""
    return policy.removesuffix(f"-{Select.HIGHEST.value}").removesuffix(f"-{Select.LOWEST.value}")


def _draw_drop(axes: Any, curve: DropCurve, label: str, colour: str) -> None:
    kl, high = ([max(value, _LEAST) for value in values] for values in (curve.kl, curve.kl_high))
    axes.plot(curve.layers, kl, color=colour, marker="o", markersize=4.5, linewidth=1.8, label=label)
    axes.fill_between(curve.layers, kl, high, color=colour, alpha=0.15, linewidth=0)


def _interval(candidate: Candidate) -> tuple[float, float]:
    return candidate.kl_low or candidate.kl, candidate.kl_high or candidate.kl


def _draw_floor(axes: Any, at: float, candidate: Candidate) -> None:
    low, high = _interval(candidate)
    axes.fill_between([at - 0.44, at + 0.44], low, high, color=_FLOOR, alpha=0.25, linewidth=0)
    axes.hlines(candidate.kl, at - 0.44, at + 0.44, color=_FLOOR, linewidth=1.4)


def _shape(candidate: Candidate) -> str:
    """A dot for one cut, a triangle for two, pointing down where the second drops everything."""
    if candidate.second is None:
        return "o"
    return "v" if isinstance(candidate.second.chooser, Nothing) else "^"


def _draw_mark(axes: Any, x: float, candidate: Candidate, *, alpha: float) -> None:
    low, high = _interval(candidate)
    colour = hue_of(candidate.policy) or MARK
    face = "white" if candidate.policy.endswith(Select.LOWEST.value) else colour
    axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.7 * alpha)
    mark = {"color": colour, "markerfacecolor": face, "markersize": 6, "alpha": alpha}
    axes.plot(x, candidate.kl, _shape(candidate), **mark)


def _draw_legend(axes: Any, names: Sequence[str], record: Record, *, recommended: bool) -> None:
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"marker": "o", "linestyle": ""}
    scores = dict.fromkeys(map(_score, names))
    handles = [Line2D([], [], color=HUES.get(score, MARK), label=score, **dot) for score in scores]
    handles.append(Line2D([], [], color=MARK, markerfacecolor="white", label="open: lowest kept", **dot))
    shapes = dict.fromkeys(_shape(candidate) for candidate in record.candidates)
    for shape, label in (("v", "second cut drops all"), ("^", "second cut at random")):
        if shape in shapes:
            handles.append(Line2D([], [], color=MARK, marker=shape, linestyle="", label=label))
    if any((candidate.images or record.images) < record.images for candidate in record.candidates):
        handles.append(Line2D([], [], color=MARK, alpha=_PALE, label="pale: fell out of the race", **dot))
    handles.append(Line2D([], [], color=_FLOOR, linewidth=4, alpha=0.5, label="random tokens"))
    if recommended:
        ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "color": MARK}
        handles.append(Line2D([], [], label="recommended", **ring, **dot))
    axes.legend(
        handles=handles, frameon=False, fontsize=8.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.11)
    )

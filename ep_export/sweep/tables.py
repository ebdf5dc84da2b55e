"""A sweep's numbers as HTML tables: methods by layers for one keep, and what is saved where."""

from __future__ import annotations

import html
from collections.abc import Callable

from ep_export.sweep.findings import RANDOM, RECOMMENDED, standing
from ep_export.sweep.record import Estimate, MethodInfo, Row, SweepRecord

__all__ = ["cost_table", "matrix"]

_VALUES: dict[str, Callable[[Row], Estimate | None]] = {
    "accuracy": lambda row: row.accuracy,
    "agreement": lambda row: row.agreement,
    "kl": lambda row: row.kl,
}
_SIGNS = {1: ' <span class="up">▲</span>', -1: ' <span class="down">▼</span>', 0: "", None: ""}


def matrix(record: SweepRecord, keep: float, value: str) -> str:
    """Methods in rows, layers in columns.

    Args:
        record: The sweep.
        keep: One of its keeps.
        value: "accuracy", "agreement" or "kl".
    """
    layers = [
        layer
        for layer in record.swept_layers
        if any((row.layer, row.keep) == (layer, keep) for row in record.rows)
    ]
    best = {layer: _best(record, keep, layer, value) for layer in layers}
    head = "".join(f"<th>{layer or 'before'}</th>" for layer in layers)
    lines = "".join(_line(record, method, keep, value, best) for method in record.methods)
    return (
        f'<div class="wide"><table><thead><tr><th>method</th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def cost_table(record: SweepRecord) -> str:
    """FLOPs, caches and measured prefill by layer and keep: the same for all methods but for their cost."""
    head = "".join(f"<th>keep {keep:g}</th>" for keep in record.keeps)
    lines = []
    for layer in record.swept_layers:
        cells = "".join(f"<td>{_saved(record, layer, keep)}</td>" for keep in record.keeps)
        lines.append(f"<tr><th>{f'layer {layer}' if layer else 'before the decoder'}</th>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th>pruned</th>{head}</tr></thead><tbody>{"".join(lines)}'
        "</tbody></table></div>"
    )


def _line(
    record: SweepRecord, method: MethodInfo, keep: float, value: str, best: dict[int, float | None]
) -> str:
    rows = {layer: record.row(method.key, layer, keep) for layer in best}
    if not any(rows.values()):
        return ""
    cells = "".join(_cell(row, value, best[layer]) for layer, row in rows.items())
    kind = ' class="ours"' if method.key == RECOMMENDED else ""
    return f"<tr{kind}><th>{html.escape(method.title)}</th>{cells}</tr>"


def _cell(row: Row | None, value: str, best: float | None) -> str:
    estimate = _VALUES[value](row) if row is not None else None
    if row is None or estimate is None:
        return "<td></td>"
    kind = ' class="best"' if estimate.value == best else ""
    sign = "" if row.method == RANDOM else _SIGNS[standing(row, RANDOM)]
    published = ' title="where its authors prune"' if row.published else ""
    if value == "kl":
        text, interval = f"{estimate.value:.3g}", f"{estimate.low:.2g} to {estimate.high:.2g}"
    else:
        text, interval = f"{estimate.value:.1%}", f"{100 * estimate.low:.0f} to {100 * estimate.high:.0f}"
    return f"<td{kind}{published}>{text}{sign}<small>{interval}</small></td>"


def _best(record: SweepRecord, keep: float, layer: int, value: str) -> float | None:
    found = [_VALUES[value](row) for row in record.rows if (row.layer, row.keep) == (layer, keep)]
    values = [estimate.value for estimate in found if estimate is not None]
    if not values:
        return None
    return min(values) if value == "kl" else max(values)


def _saved(record: SweepRecord, layer: int, keep: float) -> str:
    rows = [row for row in record.rows if (row.layer, row.keep) == (layer, keep)]
    if not rows:
        return ""
    row = rows[0]
    flops, cache = 1 - row.flops / record.unpruned.flops, 1 - row.kv_bytes / record.unpruned.kv_bytes
    said = f"FLOPs -{flops:.0%}, KV -{cache:.0%}"
    timed = sorted(row.prefill.speedup for row in rows if row.prefill is not None)
    if timed:
        low, high = timed[0], timed[-1]
        spread = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        said += f"<small>prefill measured {spread} x</small>"
    return said

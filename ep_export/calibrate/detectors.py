"""Several detectors of a collapse: one test over every metric, UNComp's rule, and where they agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ep_export.calibrate.record import LayerCurve
from ep_export.calibrate.statistics import floats
from ep_export.entropy import find_collapse, fixed_rule_stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ep_export.entropy import Collapse

__all__ = ["layer_curve", "where_detectors_agree"]

_RULED = "truncated"
"""The metric that UNComp's rule is of."""

_LOGARITHMIC = "vendi"
"""Its logarithm is an entropy, which is what drops by nats."""


_NO_ENTROPY = "nuclear"
"""The metric that is not in nats."""


def layer_curve(metric: str, values: NDArray[np.float64], *, seed: int) -> LayerCurve:
    """A metric's curve, and whether it collapses.

    Args:
        metric: Key of an `ep_export.entropy.LayerMetric`.
        values: [images, layers].
        seed: Of the resampling.
    """
    mean = values.mean(axis=0)
    if metric == _RULED:
        stages = fixed_rule_stages(mean)
        collapse = stages[0] if stages else None
        finding = f"drops by more than 1 nat at {f'layer {collapse}' if stages else 'no layer'}"
    else:
        judged = np.log(values) if metric == _LOGARITHMIC else values
        judgement = find_collapse(judged, seed=seed, unit="" if metric == _NO_ENTROPY else " nats")
        collapse, finding = judgement.layer, judgement.finding
    return LayerCurve(metric, floats(mean), floats(values.std(axis=0)), collapse, finding)


def where_detectors_agree(queries: Collapse, keys: Collapse, metrics: Sequence[LayerCurve]) -> str:
    """One sentence: which detectors name which layer.

    Args:
        queries: Of the entropy of the queries.
        keys: Of the keys.
        metrics: The others.
    """
    named = {"query entropy": queries.layer, "key entropy": keys.layer}
    named |= {curve.metric: curve.collapse for curve in metrics}
    layers = sorted({layer for layer in named.values() if layer is not None})
    if not layers:
        return f"none of {len(named)} detectors sees a collapse"
    parts = [
        f"layer {layer}: {', '.join(name for name, at in named.items() if at == layer)}" for layer in layers
    ]
    blind = [name for name, at in named.items() if at is None]
    text = f"{len(named) - len(blind)} of {len(named)} detectors see a collapse, {'; '.join(parts)}"
    return f"{text}; not {', '.join(blind)}" if blind else text

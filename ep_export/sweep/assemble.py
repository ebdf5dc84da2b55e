"""From the answers of single questions to the sweep's rows, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ep_export.entropy import find_collapse
from ep_export.methods import RANDOM_TOKENS, Method
from ep_export.sweep.calibrated import RECOMMENDED
from ep_export.sweep.record import (
    Difference,
    Entropies,
    Estimate,
    MethodInfo,
    Prefill,
    Recommended,
    Row,
    Unpruned,
)
from ep_export.sweep.ways import Spot, Way, cost, keeps_after

if TYPE_CHECKING:
    from ep_export.dims import DecoderDims
    from ep_export.sweep.measure import QuestionResult
    from ep_export.sweep.statistics import Sampling

__all__ = ["entropies", "in_hindsight", "method_infos", "rows", "unpruned"]


class _Column:
    """One way over all questions."""

    def __init__(self, way: Way, results: Sequence[QuestionResult]) -> None:
        found = [result.ways[way.key] for result in results]
        self.kl = np.array([one.kl for one in found])
        self.agreement = np.array([one.agreement for one in found])
        self.right: NDArray[np.float64] | None = None
        if found[0].right:
            self.right = np.array([[float(mark) for mark in one.right] for one in found])


def rows(
    ways: Sequence[Way],
    results: Sequence[QuestionResult],
    *,
    dims: DecoderDims,
    sampling: Sampling,
    prefill: Mapping[str, Prefill],
    found_by: Mapping[str, str],
) -> tuple[Row, ...]:
    """A row for every way, in their order.

    Args:
        ways: What was compared.
        results: Of every question, in order.
        dims: The decoder's dimensions.
        sampling: Of these questions.
        prefill: Way key -> measured time, where there is one.
        found_by: Way key -> why the row is there.
    """
    columns = {way.key: _Column(way, results) for way in ways}
    return tuple(
        Row(
            method=way.method.key,
            layer=way.spot.layer,
            keep=way.spot.keep,
            published=None
            if way.method.published_layer is None
            else way.method.published_layer == way.spot.layer,
            seeds=columns[way.key].kl.shape[1],
            accuracy=_accuracy(columns[way.key], sampling),
            agreement=sampling.mean(columns[way.key].agreement),
            kl=sampling.mean(columns[way.key].kl),
            prefill=prefill.get(way.key),
            right=_marks(columns[way.key]),
            versus=_versus(way, columns, sampling),
            found_by=found_by.get(way.key, ""),
            **_costs(way.spot, results, dims),
        )
        for way in ways
    )


def unpruned(
    results: Sequence[QuestionResult], *, dims: DecoderDims, sampling: Sampling, prefill_ms: float | None
) -> Unpruned:
    """The same questions without pruning."""
    known = results[0].full_right is not None
    right = np.array([bool(result.full_right) for result in results])
    costs = _costs(Spot(0, 1.0), results, dims)
    return Unpruned(
        accuracy=sampling.share(right) if known else None,
        right="".join("01"[int(one)] for one in right) if known else "",
        visual_tokens=float(np.mean([result.visual_tokens for result in results])),
        text_tokens=float(np.mean([result.text_tokens for result in results])),
        flops=costs["flops"],
        kv_bytes=costs["kv_bytes"],
        prefill_ms=prefill_ms,
    )


def entropies(results: Sequence[QuestionResult], *, seed: int) -> Entropies:
    """Layer entropies over the pictures, and whether they collapse."""
    measured = [result for result in results if result.query_entropy]
    query = np.array([result.query_entropy for result in measured])
    key = np.array([result.key_entropy for result in measured])
    collapse = find_collapse(query, seed=seed)
    return Entropies(
        query=_floats(query.mean(axis=0)),
        key=_floats(key.mean(axis=0)),
        query_spread=_floats(query.std(axis=0)),
        key_spread=_floats(key.std(axis=0)),
        pictures=len(measured),
        collapse=collapse.layer,
        confidence=collapse.confidence,
        finding=collapse.finding,
    )


def in_hindsight(
    recommended: Recommended, ways: Sequence[Way], results: Sequence[QuestionResult], sampling: Sampling
) -> Recommended:
    """What the recommendation lost against the best policy, now that the questions are known.

    Policies are what a bundle can prune by, at every layer the sweep tried for that keep. The best is picked
    and measured on the same questions, so that the regret errs upwards.
    """
    ours = [way for way in ways if way.method.ours and way.spot.keep == recommended.keep]
    taken = [way for way in ours if way.method.key == RECOMMENDED]
    if not taken:
        return recommended
    columns = {way.key: _Column(way, results) for way in ours}
    own = columns[taken[0].key]
    best = min(
        (way for way in ours if way.method.key != RECOMMENDED or len(ours) == 1),
        key=lambda way: float(columns[way.key].kl.mean()),
    )
    accuracy = None
    if own.right is not None:
        top = max((column.right for column in columns.values() if column.right is not None), key=np.mean)
        accuracy = sampling.mean(top - own.right)
    return replace(
        recommended,
        best_method=best.method.key,
        best_layer=best.spot.layer,
        regret_kl=sampling.mean(own.kl - columns[best.key].kl),
        regret_accuracy=accuracy,
    )


def method_infos(methods: Sequence[Method]) -> tuple[MethodInfo, ...]:
    """What a reader needs to know of each method."""
    return tuple(
        MethodInfo(
            key=method.key, title=method.title, source=method.source, idea=method.idea, ours=method.ours
        )
        for method in methods
    )


def _accuracy(column: _Column, sampling: Sampling) -> Estimate | None:
    if column.right is None:
        return None
    if column.right.shape[1] == 1:
        return sampling.share(column.right[:, 0] > 0)
    return sampling.mean(column.right)


def _marks(column: _Column) -> tuple[str, ...]:
    if column.right is None:
        return ()
    return tuple("".join("01"[int(mark)] for mark in draw) for draw in column.right.T)


def _versus(way: Way, columns: Mapping[str, _Column], sampling: Sampling) -> tuple[Difference, ...]:
    """The paired difference from random tokens at the same spot."""
    floor = columns.get(Way(RANDOM_TOKENS, way.spot).key)
    if floor is None or way.method.chance:
        return ()
    own = columns[way.key]
    accuracy = None
    if own.right is not None and floor.right is not None:
        accuracy = sampling.mean(own.right - floor.right)
    return (Difference(RANDOM_TOKENS.key, accuracy, sampling.mean(own.kl - floor.kl)),)


def _costs(spot: Spot, results: Sequence[QuestionResult], dims: DecoderDims) -> dict[str, float]:
    costs = [cost(dims, spot, result.visual_tokens, result.text_tokens) for result in results]
    kept = [keeps_after(spot, dims.layers, result.visual_tokens) for result in results]
    return {
        "kept_tokens": float(np.mean(kept)),
        "flops": float(np.mean([one.flops for one in costs])),
        "kv_bytes": float(np.mean([one.kv_bytes for one in costs])),
    }


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)

"""From the results of single questions to the sweep's rows, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ep_export.entropy import find_collapse
from ep_export.measure.ways import UNPRUNED, Scaling, on_weights, one_cut
from ep_export.methods import find_methods, method_named
from ep_export.planning import layer_flops, span_tokens
from ep_export.policy import ADAPTIVE, Keep
from ep_export.sweep.record import (
    RANDOM,
    RECOMMENDED,
    SCHEDULE,
    Difference,
    Entropies,
    MethodInfo,
    Prefill,
    Recommended,
    RoundedUnpruned,
    Row,
    SameBudget,
    Unpruned,
)

if TYPE_CHECKING:
    from ep_export.dims import DecoderDims
    from ep_export.measure.question import QuestionResult
    from ep_export.measure.ways import Way
    from ep_export.numerics import Weights
    from ep_export.policy import Schedule
    from ep_export.sweep.compared import Compared
    from ep_export.sweep.statistics import MeanInterval, Sampling

__all__ = ["entropies", "in_hindsight", "method_infos", "rounded_unpruned", "rows", "unpruned"]


_OWN = frozenset({RECOMMENDED, ADAPTIVE, SCHEDULE})
"""Rows that are no method's."""

_AVERAGE = SameBudget.AVERAGE
_CACHE_BYTES = 2
"""float16."""


class _Column:
    """One way over all questions; arrays are [questions, draws]."""

    def __init__(self, key: str, results: Sequence[QuestionResult]) -> None:
        ways = [result.ways[key] for result in results]
        self.kl = np.array([one.kl for one in ways])
        self.agreement = np.array([one.agreement for one in ways])
        self.right: NDArray[np.float64] | None = None
        if ways[0].right:
            self.right = np.array([[float(mark) for mark in one.right] for one in ways])

    def accuracy(self, sampling: Sampling) -> MeanInterval | None:
        """Exact answers."""
        return None if self.right is None else sampling.share(self.right)

    def below(self, best: _Column, sampling: Sampling) -> MeanInterval:
        """By how much another way is better, in what rows are ranked by."""
        return sampling.difference(best.ranked - self.ranked)

    @property
    def ranked(self) -> NDArray[np.float64]:
        """[questions, 1] mean over draws of what rows are ranked by."""
        values = self.agreement if self.right is None else self.right
        return np.asarray(values.mean(axis=1, keepdims=True))

    @property
    def marks(self) -> tuple[str, ...]:
        """A string a draw, "1" right and "0" wrong."""
        return (
            () if self.right is None else tuple("".join("01"[int(m)] for m in draw) for draw in self.right.T)
        )


def rows(
    compared: Sequence[Compared],
    results: Sequence[QuestionResult],
    *,
    dims: DecoderDims,
    sampling: Sampling,
    prefill: Mapping[str, Prefill],
) -> tuple[Row, ...]:
    """A row for everything that was compared, in its order.

    Args:
        compared: What was compared.
        results: Of every question, in order.
        dims: The decoder's dimensions.
        sampling: Of these questions.
        prefill: Way key -> measured time, where there is one.
    """
    columns = {one.key: _Column(one.key, results) for one in compared}
    best = _best(compared, columns)
    return tuple(_row(one, columns, best[one.keep], results, dims, sampling, prefill) for one in compared)


def _best(compared: Sequence[Compared], columns: Mapping[str, _Column]) -> dict[float, _Column]:
    """For every keep what ranks first on full weights at the same average; of equal ones the closest."""
    best: dict[float, _Column] = {}
    full = [one for one in compared if one.weights is None]
    for keep in dict.fromkeys(one.keep for one in full):
        here = [columns[one.key] for one in full if one.keep == keep and _budget(one) is _AVERAGE]
        here = here or [columns[one.key] for one in full if one.keep == keep]
        best[keep] = max(here, key=lambda column: (float(column.ranked.mean()), -float(column.kl.mean())))
    return best


def unpruned(
    results: Sequence[QuestionResult], *, dims: DecoderDims, sampling: Sampling, prefill_ms: float | None
) -> Unpruned:
    """The same questions without pruning."""
    known = results[0].full_right is not None
    right = np.array([bool(result.full_right) for result in results])
    costs = [_cost(dims, result, [(dims.layers, result.visual_tokens)]) for result in results]
    return Unpruned(
        accuracy=sampling.share(right[:, None].astype(np.float64)) if known else None,
        right="".join("01"[int(one)] for one in right) if known else "",
        visual_tokens=float(np.mean([result.visual_tokens for result in results])),
        text_tokens=float(np.mean([result.text_tokens for result in results])),
        **_mean_cost(costs),
        prefill_ms=prefill_ms,
    )


def rounded_unpruned(
    name: str, weights: Weights, results: Sequence[QuestionResult], sampling: Sampling
) -> RoundedUnpruned:
    """The same questions without pruning on rounded weights."""
    column = _Column(on_weights(UNPRUNED, name), results)
    return RoundedUnpruned(
        name=name,
        weights=weights,
        accuracy=column.accuracy(sampling),
        agreement=sampling.share(column.agreement),
        kl=sampling.mean(column.kl),
        right="".join(column.marks),
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
    recommended: Recommended,
    compared: Sequence[Compared],
    results: Sequence[QuestionResult],
    sampling: Sampling,
) -> Recommended:
    """What the recommendation lost against the best, now that the questions are known.

    Compared with everything a bundle can prune by, at every layer the sweep tried for that keep, on full
    weights. The best is picked and measured on the same questions, so that the regret errs upwards.
    """
    at_keep = [one for one in compared if one.keep == recommended.keep and one.weights is None]
    taken = next((one for one in at_keep if one.method == RECOMMENDED), None)
    if taken is None:
        return recommended
    ours = [one for one in at_keep if one.method != RECOMMENDED and _is_ours(one.way)]
    columns = {one.key: _Column(one.key, results) for one in (taken, *ours)}
    own = columns[taken.key]
    best = min(ours or [taken], key=lambda one: float(columns[one.key].kl.mean()))
    accuracy = None
    if own.right is not None:
        top = max((column.right for column in columns.values() if column.right is not None), key=np.mean)
        accuracy = sampling.difference(
            top.mean(axis=1, keepdims=True) - own.right.mean(axis=1, keepdims=True)
        )
    return replace(
        recommended,
        best_method=best.method,
        best_layer=best.layer,
        regret_kl=sampling.mean(own.kl - columns[best.key].kl),
        regret_accuracy=accuracy,
    )


def method_infos(compared: Sequence[Compared], schedule: Schedule | None) -> tuple[MethodInfo, ...]:
    """What a reader needs to know of each method: the recommended schedule first, then as in `METHODS`.

    After them the same on rounded weights, which stand in key and title.
    """
    keys = dict.fromkeys(one.method for one in compared)
    infos = []
    if RECOMMENDED in keys:
        idea = "keeps what a calibration on other pictures measured best"
        infos.append(MethodInfo(RECOMMENDED, "Recommended", "ep-export calibrate", idea, ours=True))
    if ADAPTIVE in keys:
        idea = "lets every picture keep its own number of tokens, at the same average"
        infos.append(MethodInfo(ADAPTIVE, "Adaptive keep", "ep-export calibrate", idea, ours=True))
    if SCHEDULE in keys:
        ours = all(_is_ours(one.way) for one in compared if one.method == SCHEDULE)
        infos.append(MethodInfo(SCHEDULE, "Your schedule", "--cut", str(schedule), ours=ours))
    methods = find_methods(tuple(key for key in keys if key not in _OWN))
    infos += [MethodInfo(m.key, m.title, m.source, m.idea, m.ours) for m in methods]
    rounded = dict.fromkeys(one.weights for one in compared if one.weights is not None)
    return (
        *infos,
        *(
            replace(info, key=on_weights(info.key, name), title=f"{info.title}, {name}")
            for name in rounded
            for info in infos
        ),
    )


def _row(
    one: Compared,
    columns: Mapping[str, _Column],
    best: _Column,
    results: Sequence[QuestionResult],
    dims: DecoderDims,
    sampling: Sampling,
    prefill: Mapping[str, Prefill],
) -> Row:
    column = columns[one.key]
    kept = np.mean([result.ways[one.key].kept for result in results], axis=0)
    return Row(
        method=on_weights(one.method, one.weights),
        layer=one.layer,
        keep=one.keep,
        cuts=one.way.cuts,
        published=_published(one),
        seeds=column.kl.shape[1],
        accuracy=column.accuracy(sampling),
        agreement=sampling.share(column.agreement),
        kl=sampling.mean(column.kl),
        kept_tokens=tuple(float(count) for count in kept),
        **_mean_cost([_way_cost(one, result, dims) for result in results]),
        prefill=prefill.get(one.key),
        right=column.marks,
        over_random=_over_random(one, columns, sampling),
        below_best=None if column is best else column.below(best, sampling),
        budget=_budget(one),
        weights=one.weights,
        over_full_weights=_over_full_weights(one, columns, sampling),
    )


def _published(one: Compared) -> bool | None:
    if one.method in _OWN:
        return None
    layer = method_named(one.method).published_layer
    return None if layer is None else layer == one.layer


def _over_random(one: Compared, columns: Mapping[str, _Column], sampling: Sampling) -> Difference | None:
    """The paired difference from random tokens at the same layer and keep, on the same weights."""
    floor = columns.get(on_weights(one_cut(one.layer, RANDOM, Keep(ratio=one.keep)).key, one.weights))
    if floor is None or one.method == RANDOM:
        return None
    return _difference(columns[one.key], floor, sampling)


def _over_full_weights(
    one: Compared, columns: Mapping[str, _Column], sampling: Sampling
) -> Difference | None:
    """The paired difference that rounding makes."""
    if one.weights is None:
        return None
    return _difference(columns[one.key], columns[one.way.key], sampling)


def _difference(own: _Column, other: _Column, sampling: Sampling) -> Difference:
    accuracy = None
    if own.right is not None and other.right is not None:
        accuracy = sampling.difference(own.right - other.right)
    agreement = sampling.difference(own.agreement - other.agreement)
    return Difference(accuracy, sampling.mean(own.kl - other.kl), agreement)


def _budget(one: Compared) -> SameBudget:
    return SameBudget.FIRST_TOKEN if one.way.scaling is Scaling.FLOPS else SameBudget.AVERAGE


def _way_cost(one: Compared, result: QuestionResult, dims: DecoderDims) -> tuple[int, int, int]:
    """Decoder FLOPs, FLOPs to the first token and cache bytes of what was really kept on a question."""
    measured, way = result.ways[one.key], one.way
    if way.scaling is not None:
        spans = [(dims.layers, measured.kept[0])]
    else:
        kept = span_tokens(way.schedule, dims.layers, result.visual_tokens, measured.kept)
        spans = [(len(span), visual) for span, visual in kept]
    return _cost(dims, result, spans, vision_flops=measured.vision_flops)


def _cost(
    dims: DecoderDims,
    result: QuestionResult,
    spans: Sequence[tuple[int, int]],
    *,
    vision_flops: int | None = None,
) -> tuple[int, int, int]:
    """The same of (layers, visual tokens they see)."""
    flops = sum(layers * layer_flops(dims, visual + result.text_tokens) for layers, visual in spans)
    cached = sum(layers * visual for layers, visual in spans)
    vision = result.vision_flops if vision_flops is None else vision_flops
    return flops, flops + vision, cached * 2 * dims.kv_heads * dims.head_dim * _CACHE_BYTES


def _mean_cost(costs: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    names = ("flops", "first_token_flops", "kv_bytes")
    return {name: float(mean) for name, mean in zip(names, np.mean(costs, axis=0), strict=True)}


def _is_ours(way: Way) -> bool:
    """Whether a bundle can prune this way."""
    return bool(way.cuts) and all(method_named(cut.method).ours for cut in way.cuts)


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)

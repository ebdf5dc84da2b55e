"""One component on the same inputs in PyTorch and in every backend, compared by Polygraphy's comparator.

Polygraphy runs and measures; how large a difference may be, and why, comes from `validate.tolerance`, for
each output of each run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from ep_export.bundle import Component, Manifest, Role
from ep_export.choosers import KeptDifference, difference
from ep_export.policy import Coverage, MaxMin
from ep_export.runtime.base import Runner
from ep_export.validate.choices import graph_spread
from ep_export.validate.comparison import Comparison, Finding
from ep_export.validate.component_feeds import ComponentFeeds
from ep_export.validate.component_oracle import Arrays, ComponentOracle, prune_tokens
from ep_export.validate.report import Verdict
from ep_export.validate.tolerance import Tolerance, output_tolerance

__all__ = ["ORACLE", "Oracles", "compare_component", "compared", "quiet"]

ORACLE = "pytorch"
_CACHES = "present"
_KEPT, _SCORES = "kept_index", "scores"
_NEAR_TIE = "the kept set differs only by near-ties; compared given the backend's own"


_Kept = NDArray[np.int64] | None
"""Rows that a prune component is to keep, or None for its own choice."""


@dataclass(frozen=True)
class Oracles:
    """PyTorch in float32, and in the graphs' type where that is another.

    Attributes:
        exact: float32.
        half: In the graphs' half type; None for float32 graphs.
        vision_layers: Depth of the vision encoder.
    """

    exact: ComponentOracle
    half: ComponentOracle | None
    vision_layers: int


def compare_component(
    manifest: Manifest,
    given: ComponentFeeds,
    oracles: Oracles,
    backends: Mapping[str, Callable[[], Runner]],
) -> tuple[list[Finding], RunResults]:
    """Run one component everywhere and compare.

    Args:
        manifest: The bundle's.
        given: The component and its inputs.
        oracles: PyTorch.
        backends: Name -> opens the component there.

    Returns:
        One finding a backend and output (all caches are one); and everything that was
        computed, as Polygraphy keeps it.
    """
    everything = RunResults()
    noise = _noise(given, oracles)
    findings: list[Finding] = []
    with quiet():
        for name, opener in backends.items():
            results = _run_backend(name, opener, given)
            kept = _followed(manifest, given, results)
            oracle = ORACLE if all(rows is None for rows in kept) else f"{ORACLE}, kept as {name}"
            if oracle not in everything:
                everything.append((oracle, _run_oracle(oracle, oracles.exact, given, kept)))
            everything.append((name, results))
            runs = list(zip(everything[oracle], results, noise, kept, strict=True))
            findings += _findings(manifest, given, oracles.vision_layers, name, runs)
    return findings, everything


@contextmanager
def quiet() -> Iterator[None]:
    """Polygraphy logs every tensor to stdout, where our data goes; what it finds is in its results."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


def compared(
    wanted: IterationResult, got: IterationResult, tolerances: Mapping[str, Tolerance], where: str
) -> dict[str, Comparison]:
    """One run of two runners, measured by Polygraphy.

    Args:
        wanted: The oracle's outputs.
        got: The backend's.
        tolerances: Output -> what it may differ.
        where: The case, for notes.

    Returns:
        Output -> comparison.
    """
    scales = {name: float(np.abs(wanted[name]).max(initial=0.0)) for name in tolerances}
    allowed = {name: tolerance.allowed(scales[name]) for name, tolerance in tolerances.items()}
    # `max` with no relative part: passed means the largest difference is at most what is allowed
    compare = SimpleCompareFunc(atol={"": 0.0, **allowed}, rtol=0.0, check_error_stat="max")
    pair = RunResults([("wanted", [wanted]), ("got", [got])])
    with np.errstate(all="ignore"):  # it also computes relative errors, which divide by zeros
        results = Comparator.compare_accuracy(pair, compare_func=compare)
    measured = next(iter(results[0].values()))[0]
    return {
        name: _comparison(measured.get(name), f"{where}, {name}", allowed[name], scales[name])
        for name in tolerances
    }


def _comparison(result: Any, where: str, allowed: float, scale: float) -> Comparison:
    if result is None or isinstance(result, bool):  # no output of that name, or shape
        return Comparison(Verdict.FAIL, math.inf, allowed, scale, where, "is missing or of another shape")
    error = float(result.max_absdiff)
    if not math.isfinite(error):
        return Comparison(Verdict.FAIL, math.inf, allowed, scale, where, "holds values that are not finite")
    return Comparison(Verdict.PASS if bool(result) else Verdict.FAIL, error, allowed, scale, where)


def _run_backend(name: str, opener: Callable[[], Runner], given: ComponentFeeds) -> list[IterationResult]:
    """Every run of a component in the very session `ep-export run` would open."""
    with opener() as runner:
        outputs = [runner.run(feeds) for feeds in given.feeds]
        return [
            IterationResult({key: np.array(value.numpy()) for key, value in each.items()}, runner_name=name)
            for each in outputs
        ]


def _run_oracle(
    name: str, oracle: ComponentOracle, given: ComponentFeeds, kept: Sequence[_Kept]
) -> list[IterationResult]:
    return [
        IterationResult(oracle.run(given.component, feeds, kept=rows), runner_name=name)
        for feeds, rows in zip(given.feeds, kept, strict=True)
    ]


def _noise(given: ComponentFeeds, oracles: Oracles) -> list[dict[str, float]]:
    """For every run and output: how far PyTorch in the half type is from PyTorch in float32."""
    component = given.component
    if oracles.half is None or component.role is Role.PRUNE:  # pruning copies, and scores in float32
        return [{} for _ in given.feeds]
    noise = []
    for feeds in given.feeds:
        exact, half = (oracle.run(component, feeds) for oracle in (oracles.exact, oracles.half))
        noise.append({name: float(np.abs(half[name] - exact[name]).max(initial=0.0)) for name in exact})
    return noise


def _followed(manifest: Manifest, given: ComponentFeeds, results: Sequence[IterationResult]) -> list[_Kept]:
    """For every run the rows the oracle is to keep as the backend did: where they differ by near-ties."""
    if given.component.role is not Role.PRUNE:
        return [None] * len(given.feeds)
    return [
        outputs[_KEPT] if _near_tie(manifest, given.component, feeds, outputs) else None
        for feeds, outputs in zip(given.feeds, results, strict=True)
    ]


def _near_tie(manifest: Manifest, prune: Component, feeds: Arrays, outputs: IterationResult) -> bool:
    if prune.chooser is None or "keep_slots" not in feeds:
        return False
    index, rows = feeds["visual_index"], outputs[_KEPT]
    tokens = prune_tokens(prune, manifest.dims, feeds)
    kept = torch.from_numpy(np.array(rows[np.isin(rows, index)]))
    scores = np.array(outputs[_SCORES]) if _SCORES in outputs else None
    spread = graph_spread(prune.chooser, tokens, scores, manifest.degree)
    verdict = difference(prune.chooser, tokens, kept, len(feeds["keep_slots"]), tolerance=spread)
    text = np.setdiff1d(np.arange(feeds["hidden"].shape[1]), index)
    in_order = bool(np.all(np.diff(rows) > 0)) and bool(np.isin(text, rows).all())
    return verdict is KeptDifference.NEAR_TIE and in_order


def _findings(
    manifest: Manifest,
    given: ComponentFeeds,
    vision_layers: int,
    backend: str,
    runs: Sequence[tuple[IterationResult, IterationResult, Mapping[str, float], _Kept]],
) -> list[Finding]:
    component = given.component
    groups: dict[str, list[Comparison]] = {}
    reasons: dict[str, str] = {}
    for case, feeds, (wanted, got, noise, kept) in zip(given.cases, given.feeds, runs, strict=True):
        tokens = prune_tokens(component, manifest.dims, feeds) if component.role is Role.PRUNE else None
        tolerances = {
            spec.name: output_tolerance(
                manifest,
                component,
                spec,
                vision_layers=vision_layers,
                noise=noise.get(spec.name, 0.0),
                tokens=tokens,
            )
            for spec in component.outputs
            # what such a score says depends on what was chosen before
            if kept is None or spec.name != _SCORES or not isinstance(component.chooser, MaxMin | Coverage)
        }
        for name, comparison in compared(wanted, got, tolerances, case).items():
            group = _CACHES if name.startswith(f"{_CACHES}.") else name
            reasons[group] = tolerances[name].reason
            followed = kept is not None and name == _KEPT
            groups.setdefault(group, []).append(_tied(comparison) if followed else comparison)
    label = f"{component.name} {{}}, {backend}"
    return [
        Finding(label.format("caches" if group == _CACHES else group), tuple(comparisons), reasons[group])
        for group, comparisons in groups.items()
    ]


def _tied(equal: Comparison) -> Comparison:
    """The oracle was told to follow: equal by construction, and said to be so."""
    if equal.verdict is not Verdict.PASS:
        return equal
    return Comparison(Verdict.AMBIGUOUS, equal.error, equal.tolerance, 1.0, equal.where, _NEAR_TIE)

"""One component on the same inputs in PyTorch and in every backend, compared by Polygraphy's comparator.

Polygraphy runs and measures; how large a difference may be, and why, comes from `validate.tolerance`, for
each output of each run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

from ep_export.bundle import Component, Manifest, Precision
from ep_export.entropy import KeptDifference, kept_difference, token_scores
from ep_export.runtime.base import Runner
from ep_export.validate.choices import choice_tolerance
from ep_export.validate.comparison import Comparison, Finding
from ep_export.validate.polygraphy_feeds import ComponentFeeds
from ep_export.validate.polygraphy_oracle import Components
from ep_export.validate.polygraphy_runners import BackendRunner, Kept, OracleRunner, quiet
from ep_export.validate.report import Verdict
from ep_export.validate.tolerance import EXACT, Tolerance, float32_tolerance, half_tolerance

__all__ = ["ORACLE", "Oracles", "compare_component", "compared", "layers_before", "tolerance_of"]

ORACLE = "pytorch"
_CACHES = "present"
_KEPT = "kept_index"
_INTEGERS = "integers: equal or not"
_NEAR_TIE = "the kept set differs only by near-ties; compared given the backend's own"


@dataclass(frozen=True)
class Oracles:
    """PyTorch in float32, and in the graphs' type where that is another.

    Attributes:
        exact: float32.
        half: In the graphs' half type; None for float32 graphs.
        vision_layers: Depth of the vision encoder.
    """

    exact: Components
    half: Components | None
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
        What was found, one finding a backend and output (all caches are one); and everything that was
        computed, as Polygraphy keeps it.
    """
    component = given.component
    with quiet():
        runners = [BackendRunner(name, component, opener) for name, opener in backends.items()]
        results = Comparator.run(runners, data_loader=list(given.feeds))
        made = RunResults()
        noise = _noise(given, oracles)
        findings: list[Finding] = []
        for name in backends:
            choices = _choices(manifest, given, oracles, results[name])
            kept = [choice[1] for choice in choices]
            oracle = ORACLE if all(choice is None for choice in kept) else f"{ORACLE}, kept as {name}"
            if oracle not in made:
                runner = OracleRunner(oracle, component, oracles.exact, kept)
                made.extend(Comparator.run([runner], data_loader=list(given.feeds)))
            made.append((name, results[name]))
            runs = (made[oracle], results[name], noise)
            findings += _findings(manifest, given, oracles, name, runs, choices)
    return findings, made


def tolerance_of(manifest: Manifest, layers: int, noise: float) -> Tolerance:
    """For a value that went through so many layers and that the half type moves by `noise`."""
    float32 = float32_tolerance(manifest.dims, layers)
    if manifest.precision is Precision.FP32:
        return float32
    return half_tolerance(float32, noise, manifest.precision)


def layers_before(manifest: Manifest, component: str, output: str, vision_layers: int) -> int:
    """Layers of its own component that an output went through."""
    first = manifest.policy.layer if component == "decoder_tail" else 0
    last = manifest.policy.layer if component == "decoder_head" else manifest.dims.layers
    if output.startswith(f"{_CACHES}."):
        return int(output.split(".")[1]) - first + 1
    return last - first if component.startswith("decoder_") else vision_layers


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
    if result is None or isinstance(result, bool):  # Polygraphy found no output of that name, or shape
        return Comparison(Verdict.FAIL, math.inf, allowed, scale, where, "is missing or of another shape")
    error = float(result.max_absdiff)
    if not math.isfinite(error):
        return Comparison(Verdict.FAIL, math.inf, allowed, scale, where, "holds values that are not finite")
    return Comparison(Verdict.PASS if bool(result) else Verdict.FAIL, error, allowed, scale, where)


def _noise(given: ComponentFeeds, oracles: Oracles) -> list[dict[str, float]]:
    """For every run and output: how far PyTorch in the half type is from PyTorch in float32."""
    if oracles.half is None:
        return [{} for _ in given.feeds]
    noise = []
    for feeds in given.feeds:
        exact = oracles.exact.run(given.component.name, feeds)
        # the half run must not choose by itself: its own near-ties are nobody's
        half = oracles.half.run(given.component.name, feeds, kept=exact.get(_KEPT))
        noise.append({name: float(np.abs(half[name] - exact[name]).max(initial=0.0)) for name in exact})
    return noise


def _choices(
    manifest: Manifest, given: ComponentFeeds, oracles: Oracles, got: Sequence[IterationResult]
) -> list[tuple[KeptDifference, Kept]]:
    """How a backend's kept set differs in every run, and the set the oracle is to follow, if any."""
    if given.component.name != "decoder_head":
        return [(KeptDifference.EQUAL, None)] * len(given.feeds)
    return [
        _choice(manifest, oracles, feeds, outputs[_KEPT])
        for feeds, outputs in zip(given.feeds, got, strict=True)
    ]


def _choice(
    manifest: Manifest, oracles: Oracles, feeds: dict[str, NDArray[Any]], kept: NDArray[np.int64]
) -> tuple[KeptDifference, Kept]:
    index, policy = feeds["visual_index"], manifest.policy
    if len(index) == len(feeds["keep_slots"]):
        return KeptDifference.EQUAL, None  # everything is kept: if it is not, the outputs say so
    own = oracles.exact.choice(feeds)
    states = own.states.numpy()
    half = oracles.half.choice(feeds).states.numpy() if oracles.half is not None else None
    difference = kept_difference(
        token_scores(own.states, policy.scorer),
        own.kept,
        kept[np.isin(kept, index)],
        len(feeds["keep_slots"]),
        visual_index=index,
        select=policy.select,
        budget=policy.budget,
        tolerance=choice_tolerance(manifest, states, layers=policy.layer, half_states=half),
    )
    text = np.setdiff1d(np.arange(feeds["inputs_embeds"].shape[1]), index)
    in_order = bool(np.all(np.diff(kept) > 0)) and bool(np.isin(text, kept).all())
    follows = difference is KeptDifference.NEAR_TIE and in_order
    return difference, kept if follows else None


def _findings(
    manifest: Manifest,
    given: ComponentFeeds,
    oracles: Oracles,
    backend: str,
    runs: tuple[Sequence[IterationResult], Sequence[IterationResult], Sequence[dict[str, float]]],
    choices: Sequence[tuple[KeptDifference, Kept]],
) -> list[Finding]:
    component = given.component
    types = {spec.name: spec.dtype for spec in component.outputs}
    groups: dict[str, list[Comparison]] = {}
    reasons: dict[str, str] = {}
    for case, wanted, got, noise, (_, kept) in zip(given.cases, *runs, choices, strict=True):
        tolerances = {
            name: _tolerance(manifest, component, name, dtype, noise.get(name, 0.0), oracles.vision_layers)
            for name, dtype in types.items()
        }
        for name, found in compared(wanted, got, tolerances, case).items():
            group = _CACHES if name.startswith(f"{_CACHES}.") else name
            reasons[group] = tolerances[name].reason
            groups.setdefault(group, []).append(_tied(found) if kept is not None and name == _KEPT else found)
    label = f"{component.name} {{}}, {backend}"
    return [
        Finding(label.format("caches" if group == _CACHES else group), tuple(found), reasons[group])
        for group, found in groups.items()
    ]


def _tied(found: Comparison) -> Comparison:
    """The oracle was told to follow: equal by construction, and said to be so."""
    if found.verdict is not Verdict.PASS:
        return found
    return Comparison(Verdict.AMBIGUOUS, found.error, found.tolerance, 1.0, found.where, _NEAR_TIE)


def _tolerance(
    manifest: Manifest, component: Component, output: str, dtype: str, noise: float, vision_layers: int
) -> Tolerance:
    if dtype == "int64":
        return Tolerance(0.0, 0.0, _INTEGERS)
    if component.name == "embed_tokens" and manifest.precision is Precision.FP32:
        return EXACT
    layers = layers_before(manifest, component.name, output, vision_layers)
    return tolerance_of(manifest, layers, noise)

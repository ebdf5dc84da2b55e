"""The stages in the order of the pipeline: what is compared at each, and with which tolerance.

Scores, prune component, kept set and hidden states are stages of every cut, caches of every span; their names
end in the cut's or span's number, a cut's only where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.bundle import Precision
from ep_export.choosers import choose
from ep_export.policy import Coverage, MaxMin
from ep_export.reference import PrefillStates
from ep_export.validate.choices import (
    choice_tolerance,
    compare_choice,
    compare_own_tokens,
    graph_spread,
)
from ep_export.validate.comparison import Comparison, Finding, compare, fold
from ep_export.validate.observe import Observation, PruneRun
from ep_export.validate.report import Stage, Verdict
from ep_export.validate.setting import Setting, half_noise, to_numpy
from ep_export.validate.tolerance import EXACT, score_tolerance, tolerance_of

__all__ = ["find", "fold_stages"]

_Pairs = list[tuple[str, int, NDArray[Any], Callable[[PrefillStates], torch.Tensor]]]
"""(what, decoder layers it went through, the bundle's array, the oracle's)."""

_NO_PICTURE = "no picture"


def find(setting: Setting, case: Observation) -> tuple[Finding, ...]:
    """Compare one case at every stage, in the order of the pipeline.

    What it returns is small: the arrays of a case can be forgotten, so that memory does not grow with the
    number of prompts.
    """
    return (
        _positions(case),
        _vision(setting, case),
        _embeddings(setting, case),
        *(finding for cut in range(len(setting.schedule.cuts)) for finding in _cut(setting, case, cut)),
        _arrays(setting, case, "logits", _logits(setting, case)),
        *(
            _arrays(setting, case, f"kv_{number}", _caches(case, span.layer_range))
            for number, span in enumerate(setting.manifest.spans)
        ),
        _tokens(setting, case),
    )


def fold_stages(cases: Sequence[Sequence[Finding]]) -> tuple[Stage, ...]:
    """One verdict a stage from the findings of all cases."""
    return tuple(fold(findings) for findings in zip(*cases, strict=True))


def _positions(case: Observation) -> Finding:
    want, name = case.given.position_ids.numpy(), case.question.name
    visual = case.given.visual_index.numpy()
    comparisons = [
        compare(f"{name}, prompt", case.prompt.position_ids, want, EXACT),
        compare(f"{name}, visual tokens", case.prompt.visual_index, visual, EXACT),
    ]
    for number, cut in enumerate(case.got.cuts):
        inside = cut.kept_index[cut.kept_index < want.shape[2]]
        comparisons.append(
            compare(f"{name}, kept at cut {number}", cut.position_ids.numpy(), want[..., inside], EXACT)
        )
    return Finding(
        "positions", tuple(comparisons), "integers: Hugging Face's own positions, kept ones unchanged"
    )


def _vision(setting: Setting, case: Observation) -> Finding:
    start = 0
    pairs: _Pairs = []
    for number, got in enumerate(case.got.visual_embeds):
        rows = slice(start, start + len(got))
        start += len(got)
        pairs.append((f"picture {number + 1}", 0, got, partial(_visual_rows, rows=rows)))
    return _arrays(setting, case, "vision", pairs)


def _embeddings(setting: Setting, case: Observation) -> Finding:
    """Rows of the embedding table: exact in float32, rounded to the graphs' type otherwise."""
    text = np.setdiff1d(np.arange(case.prompt.input_ids.shape[1]), case.prompt.visual_index)
    rows = partial(_embedding_rows, rows=text)
    got, want = case.got.inputs_embeds[0, text], to_numpy(rows(case.given))
    half = setting.manifest.precision is not Precision.FP32
    tolerance = tolerance_of(setting.manifest, 1, half_noise(case, rows)) if half else EXACT
    return Finding("embeddings", (compare(case.question.name, got, want, tolerance),), tolerance.reason)


def _cut(setting: Setting, case: Observation, cut: int) -> Iterator[Finding]:
    """What a cut's prune component scores and keeps alone, what the bundle keeps, what goes on."""
    named = partial(setting.numbered, cut=cut)
    if not case.prunes:
        yield from (Finding(named(stage), (), _NO_PICTURE) for stage in ("scores", "node", "kept", "hidden"))
        return
    chooser, run = setting.schedule.cuts[cut].chooser, case.prunes[cut]
    spread = graph_spread(chooser, run.tokens, run.outputs.get("scores"), setting.manifest.degree)
    yield _scores(setting, case, named("scores"), run, case.budgets[cut])
    yield _node(case, named("node"), run, case.budgets[cut], spread)
    yield _kept(setting, case, named("kept"), cut, spread)
    yield _arrays(setting, case, named("hidden"), _hidden(setting, case, cut))


def _scores(setting: Setting, case: Observation, stage: str, run: PruneRun, k: int) -> Finding:
    """The exported scores against float64, on what the oracle itself saw arrive."""
    chooser = run.component.chooser
    if chooser is None or "scores" not in run.outputs:
        return Finding(stage, (), "this policy scores nothing")
    choice = choose(chooser, run.tokens, k)
    if isinstance(chooser, MaxMin | Coverage) and not np.array_equal(choice.kept.numpy(), run.kept):
        return Finding(stage, (), "every score rests on those chosen before, and others were chosen")
    tolerance = score_tolerance(chooser, run.tokens, setting.manifest.degree)
    exact = choice.scores.numpy() if choice.scores is not None else np.empty(0)
    comparison = compare(case.question.name, run.outputs["scores"], exact, tolerance)
    return Finding(stage, (comparison,), tolerance.reason)


def _node(case: Observation, stage: str, run: PruneRun, k: int, spread: float) -> Finding:
    """What the prune component keeps of what the oracle saw arrive, and whether it gathers just that."""
    reason = "near-tie: exact scores no further apart than the graph's own scoring errors on these tokens"
    name, chooser, rows = case.question.name, run.component.chooser, run.outputs["kept_index"]
    if chooser is None:
        return Finding(stage, (), reason)
    feeds, outputs = run.feeds, run.outputs
    length, visual = feeds["hidden"].shape[1], feeds["visual_index"]
    inside = rows[(rows >= 0) & (rows < length)]
    exact = {
        "kept_index": np.union1d(np.setdiff1d(np.arange(length), visual), run.kept),
        "kept_visual_index": np.flatnonzero(np.isin(rows, visual)),
        "kept_hidden": feeds["hidden"][:, inside],
        "kept_position_ids": feeds["position_ids"][..., inside],
    }
    comparisons = [
        compare_choice(name, chooser, run.tokens, run.kept, k, spread),
        *(compare(f"{name}, {output}", outputs[output], want, EXACT) for output, want in exact.items()),
    ]
    return Finding(stage, tuple(comparisons), reason)


def _kept(setting: Setting, case: Observation, stage: str, cut: int, spread: float) -> Finding:
    """What the bundle keeps, run from the pictures on, of what arrives at a cut in the bundle."""
    reason = (
        "near-tie: exact scores no further apart than the graph's scoring errors plus what rounding on the "
        "way to the cut moves these scores"
    )
    if not case.forced:
        note = "text or visual tokens are missing, or positions are out of order"
        comparison = Comparison(Verdict.FAIL, math.inf, 0.0, 1.0, case.question.name, note)
        return Finding(stage, (comparison,), reason)
    settings, tokens = setting.schedule.cuts[cut], case.given.cuts[cut].tokens
    tolerance = choice_tolerance(
        setting.manifest.dims,
        settings.chooser,
        tokens,
        spread=spread,
        layers=setting.vision_layers + settings.layer,
        half=case.half.cuts[cut].tokens if case.half is not None else None,
    )
    comparison = compare_choice(
        case.question.name, settings.chooser, tokens, case.kept_there(cut), case.budgets[cut], tolerance
    )
    if case.generation.keep.threshold is None:
        return Finding(stage, (comparison,), reason)
    layers = setting.manifest.dims.layers
    counted = compare_own_tokens(
        f"{case.question.name}, how many",
        case.generation.keep,
        setting.schedule,
        tokens,
        case.budgets[cut],
        tolerance,
        layers=layers,
    )
    return Finding(stage, (comparison, counted), reason)


def _arrays(setting: Setting, case: Observation, stage: str, pairs: _Pairs) -> Finding:
    """Real-valued arrays, the oracle keeping what the bundle keeps."""
    done, reason = [], _NO_PICTURE
    for what, layers, got, of in pairs:
        tolerance = setting.tolerance(layers, half_noise(case, of))
        reason = tolerance.reason
        done.append(compare(f"{case.question.name}, {what}", got, to_numpy(of(case.given)), tolerance))
    return Finding(stage, tuple(done), reason)


def _hidden(setting: Setting, case: Observation, cut: int) -> _Pairs:
    layer = setting.schedule.cuts[cut].layer
    got = case.got.cuts[cut].hidden_states.numpy()
    return [(f"hidden states into layer {layer}", layer, got, lambda states: states.hidden_after[cut])]


def _logits(setting: Setting, case: Observation) -> _Pairs:
    return [("last position", setting.manifest.dims.layers, case.got.logits, lambda states: states.logits)]


def _caches(case: Observation, layers: range) -> _Pairs:
    return [
        (
            f"layer {i} {name}",
            i + 1,
            case.got.caches[f"past_key_values.{i}.{name}"].numpy(),
            partial(_cache, layer=i, part=part),
        )
        for i in layers
        for part, name in enumerate(("key", "value"))
    ]


def _tokens(setting: Setting, case: Observation) -> Finding:
    """Greedy answers. They may part only where the oracle itself prefers its token by a rounding."""
    noise = half_noise(case, lambda states: states.logits)
    scale = float(case.answer.scores[torch.isfinite(case.answer.scores)].abs().max())
    allowed = 2 * setting.tolerance(setting.manifest.dims.layers, noise).allowed(scale)
    reason = "answers may part where the oracle's two best logits are closer than two logit tolerances"
    return Finding("tokens", (_answers(case, allowed),), reason)


def _answers(case: Observation, allowed: float) -> Comparison:
    got, want = case.generation.token_ids, case.answer.token_ids
    name = case.question.name
    if got == want:
        return Comparison(Verdict.PASS, 0.0, allowed, 1.0, name)
    step = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    if step is None:
        note = f"one answer is longer: {len(got)} tokens, expected {len(want)}"
        return Comparison(Verdict.FAIL, math.inf, allowed, 1.0, name, note)
    scores = case.answer.scores[step]
    margin = float(scores[want[step]] - scores[got[step]])
    verdict = Verdict.AMBIGUOUS if margin <= allowed else Verdict.FAIL
    note = f"token {step + 1} is {got[step]}, expected {want[step]}, which the oracle prefers by {margin:.1e}"
    return Comparison(verdict, margin, allowed, 1.0, name, note)


def _visual_rows(states: PrefillStates, rows: slice) -> torch.Tensor:
    return states.visual_embeds[rows]


def _embedding_rows(states: PrefillStates, rows: NDArray[np.int64]) -> torch.Tensor:
    return states.inputs_embeds[0, rows]


def _cache(states: PrefillStates, layer: int, part: int) -> torch.Tensor:
    return states.caches[layer][part]

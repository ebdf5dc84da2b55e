"""The stages in the order of the pipeline: what is compared at each, and with which tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep_export.bundle import Precision
from ep_export.reference import PrefillStates
from ep_export.validate.choices import find_kept, find_node, find_scores
from ep_export.validate.comparison import Comparison, Finding, compare, fold
from ep_export.validate.observe import Observation
from ep_export.validate.report import Stage, Verdict
from ep_export.validate.setting import Setting, half_noise, to_numpy
from ep_export.validate.tolerance import EXACT

__all__ = ["find", "fold_stages"]

_Pairs = list[tuple[str, int, NDArray[Any], Callable[[PrefillStates], torch.Tensor]]]
"""(what, layers it went through, the bundle's array, the oracle's)."""


def find(setting: Setting, case: Observation) -> tuple[Finding, ...]:
    """Compare one case at every stage, in the order of the pipeline.

    What it returns is small: the arrays of a case can be forgotten, so that memory does not grow with the
    number of prompts.
    """
    return (
        _positions(case),
        _vision(setting, case),
        _embeddings(setting, case),
        find_scores(setting, case),
        find_node(setting, case),
        find_kept(setting, case),
        _arrays(setting, case, "hidden", _hidden(setting, case)),
        _arrays(setting, case, "logits", _logits(setting, case)),
        _arrays(setting, case, "kv_full", _caches(setting, case, above=False)),
        _arrays(setting, case, "kv_kept", _caches(setting, case, above=True)),
        _tokens(setting, case),
    )


def fold_stages(cases: Sequence[Sequence[Finding]]) -> tuple[Stage, ...]:
    """One verdict a stage from the findings of all cases."""
    return tuple(fold(findings) for findings in zip(*cases, strict=True))


def _positions(case: Observation) -> Finding:
    want, name = case.free.position_ids.numpy(), case.question.name
    inside = case.got.kept_index[case.got.kept_index < want.shape[2]]
    visual = case.free.visual_index.numpy()
    found = (
        compare(f"{name}, prompt", case.prompt.position_ids, want, EXACT),
        compare(f"{name}, kept", case.got.kept_position_ids, want[..., inside], EXACT),
        compare(f"{name}, visual tokens", case.prompt.visual_index, visual, EXACT),
    )
    return Finding("positions", found, "integers: Hugging Face's own positions, kept ones unchanged")


def _vision(setting: Setting, case: Observation) -> Finding:
    start = 0
    pairs: _Pairs = []
    for number, got in enumerate(case.got.visual_embeds):
        rows = slice(start, start + len(got))
        start += len(got)
        pairs.append((f"picture {number + 1}", setting.vision_layers, got, partial(_visual_rows, rows=rows)))
    return _arrays(setting, case, "vision", pairs)


def _embeddings(setting: Setting, case: Observation) -> Finding:
    """Rows of the embedding table: exact in float32, rounded to the graphs' type otherwise."""
    text = np.setdiff1d(np.arange(case.prompt.input_ids.shape[1]), case.prompt.visual_index)
    rows = partial(_embedding_rows, rows=text)
    got, want = case.got.inputs_embeds[0, text], to_numpy(rows(case.given))
    half = setting.manifest.precision is not Precision.FP32
    tolerance = setting.tolerance(1, half_noise(case, rows)) if half else EXACT
    return Finding("embeddings", (compare(case.question.name, got, want, tolerance),), tolerance.reason)


def _arrays(setting: Setting, case: Observation, stage: str, pairs: _Pairs) -> Finding:
    """Real-valued arrays, the oracle keeping what the bundle keeps."""
    done, reason = [], "no picture"
    for what, layers, got, of in pairs:
        tolerance = setting.tolerance(layers, half_noise(case, of))
        reason = tolerance.reason
        done.append(compare(f"{case.question.name}, {what}", got, to_numpy(of(case.given)), tolerance))
    return Finding(stage, tuple(done), reason)


def _hidden(setting: Setting, case: Observation) -> _Pairs:
    layers = setting.vision_layers + setting.manifest.policy.layer
    got = case.got.hidden_states.numpy()
    return [("hidden states into the tail", layers, got, lambda states: states.hidden_kept)]


def _logits(setting: Setting, case: Observation) -> _Pairs:
    layers = setting.vision_layers + setting.manifest.dims.layers
    return [("last position", layers, case.got.logits, lambda states: states.logits)]


def _caches(setting: Setting, case: Observation, *, above: bool) -> _Pairs:
    split, layers = setting.manifest.policy.layer, setting.manifest.dims.layers
    made: _Pairs = []
    for i in range(split, layers) if above else range(split):
        for part, name in enumerate(("key", "value")):
            got = case.got.caches[f"past_key_values.{i}.{name}"].numpy()
            depth = setting.vision_layers + i + 1
            made.append((f"layer {i} {name}", depth, got, partial(_cache, layer=i, part=part)))
    return made


def _tokens(setting: Setting, case: Observation) -> Finding:
    """Greedy answers. They may part only where the oracle itself prefers its token by a rounding."""
    layers = setting.vision_layers + setting.manifest.dims.layers
    noise = half_noise(case, lambda states: states.logits)
    scale = float(case.answer.scores[torch.isfinite(case.answer.scores)].abs().max())
    allowed = 2 * setting.tolerance(layers, noise).allowed(scale)
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

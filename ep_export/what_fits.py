"""What does fit where a plan does not: other weights, smaller keeps, smaller models of the family.

A plan on a target enters, suggestions leave; every one of them was estimated as the plan was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from ep_export.aliases import ALIASES
from ep_export.checkpoint import ModelConfig, open_config
from ep_export.errors import UsageError
from ep_export.fit import Estimate, estimate
from ep_export.numerics import AS_THEY_ARE, Weights, rounded_to
from ep_export.planning import Plan, make_plan
from ep_export.policy import Keep
from ep_export.weight_sizes import weight_sizes

if TYPE_CHECKING:
    from ep_export.targets import Target
    from ep_export.vision_flops import VisionWork

__all__ = ["Suggestion", "suggest"]

_MOST_A_MODEL, _MOST = 2, 6
_KEEPS = (0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Suggestion:
    """Something that fits.

    Attributes:
        model: As one would type it.
        weights: "none", "int8", "int4" or "fp8".
        keep: As an average over layers.
        total_bytes: What it takes, as `Figures.total_bytes`.
        first_token_ms: At best.
        decode_ms: A token, at best.
    """

    model: str
    weights: str
    keep: Keep
    total_bytes: int
    first_token_ms: float
    decode_ms: float


def suggest(
    model: ModelConfig,
    plan: Plan,
    target: Target,
    *,
    new_tokens: int,
    weights: Weights | None,
    shown: Callable[[ModelConfig], VisionWork],
) -> tuple[Suggestion, ...]:
    """What fits on the target: the same model first, then smaller ones of its family.

    Args:
        model: What was planned.
        plan: What does not fit.
        target: On this device.
        new_tokens: Length of the answer.
        weights: What was planned.
        shown: What the prompt asks of another model's vision encoder.
    """
    found: list[Suggestion] = []
    for candidate, planned in _models(model, plan, shown):
        own = candidate is model
        tried = (
            _suggestion(candidate, changed, target, new_tokens, kind)
            for changed, kind in _ways(candidate, planned, target, weights, own=own)
        )
        found += islice((each for each in tried if each), _MOST_A_MODEL)
    return tuple(found[:_MOST])


def _ways(
    model: ModelConfig, plan: Plan, target: Target, weights: Weights | None, *, own: bool
) -> Iterator[tuple[Plan, Weights | None]]:
    """Plans and weights to try: all weights the target takes, then those asked for with less kept."""
    if model.published is not None:
        kinds: list[Weights | None] = [model.published.weights]
    else:
        kinds = [rounded_to(kind) for kind in target.weights]
    for kind in kinds:
        if not own or kind != weights:
            yield plan, kind
    if own:
        average = plan.average_kept
        for ratio in _KEEPS:
            if ratio < average and (smaller := _with_keep(plan, Keep(ratio=ratio))):
                yield smaller, weights


def _with_keep(plan: Plan, keep: Keep) -> Plan | None:
    try:
        return make_plan(
            plan.dims,
            plan.schedule,
            keep,
            visual_tokens=plan.visual_tokens,
            text_tokens=plan.text_tokens,
            kv_bytes_per_element=plan.kv_bytes_per_element,
            vision=plan.vision,
        )
    except UsageError:  # not within what the cuts can reach
        return None


def _models(
    model: ModelConfig, plan: Plan, shown: Callable[[ModelConfig], VisionWork]
) -> Iterator[tuple[ModelConfig, Plan]]:
    """The model itself, then the family's smaller ones, the largest first."""
    yield model, plan
    others = [
        open_config(alias.name)
        for alias in ALIASES
        if alias.family == model.family.name and alias.same_as is None
    ]
    for other in sorted(others, key=_size, reverse=True):
        if _size(other) < _size(model) and plan.schedule.cuts[-1].layer < other.dims.layers:
            work = shown(other)
            changed = replace(plan, dims=other.dims, vision=work, visual_tokens=work.visual_tokens)
            if planned := _with_keep(changed, plan.keep):
                yield other, planned


def _size(model: ModelConfig) -> int:
    tower = model.family.vision_tower(model.config)
    return weight_sizes(model.dims, tower, number_bytes=1, weights=None, tied=False).stored


def _suggestion(
    model: ModelConfig, plan: Plan, target: Target, new_tokens: int, weights: Weights | None
) -> Suggestion | None:
    """None where it does not fit."""
    guess: Estimate | None = estimate(plan, target, new_tokens=new_tokens, weights=weights)
    if guess is None or not guess.fits(guess.pruned):
        return None
    return Suggestion(
        model=model.source,
        weights=weights.kind.value if weights else AS_THEY_ARE,
        keep=plan.keep,
        total_bytes=guess.pruned.total_bytes,
        first_token_ms=1e3 * guess.pruned.first_token_seconds,
        decode_ms=1e3 * guess.pruned.decode_seconds,
    )

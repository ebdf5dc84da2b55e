"""How fast a bundle answers, full against pruned: all sides in one run, turn by turn.

The full side is the same spans without what prunes between them, so that sides differ in nothing but the
number of tokens and what it takes to choose them. Every round measures every side, the order changing, so
that a noisy machine disturbs all alike; ratios are taken round by round.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.bundle import Precision
from ep_export.errors import UsageError
from ep_export.planning import make_plan
from ep_export.policy import Keep
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from ep_export.families.base import PromptInputs, Visual
    from ep_export.runtime import Generation, Prefill, Session

__all__ = ["Latency", "PrunedSide", "Side", "Spread", "Stages", "measure_latency", "policy_name"]

_STAGE = "measuring"


@dataclass(frozen=True)
class Spread:
    """Repeated measurements: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Stages:
    """What is timed, or a ratio of it.

    Attributes:
        vision: All calls of the vision encoder; the same work on every side.
        prefill: Embeddings, spans and prune components over the prompt.
        first_token: From pictures and question to the first token: preparation, vision and prefill.
        decode: One generated token after the first.
    """

    vision: Spread
    prefill: Spread
    first_token: Spread
    decode: Spread


@dataclass(frozen=True)
class Side:
    """One way of running the bundle.

    Attributes:
        latency_ms: Medians and quartiles.
        kv_bytes: Key and value caches of all layers after prefill, as allocated.
    """

    latency_ms: Stages
    kv_bytes: int


@dataclass(frozen=True)
class PrunedSide:
    """A way of pruning beside the unpruned side.

    Attributes:
        policy: Its name, see `policy_name`.
        keep: As an average over layers.
        visual_tokens_kept: For every cut the visual tokens that go on.
        latency_ms: Medians and quartiles.
        prune_ms: What of the prefill the prune components took.
        kv_bytes: See `Side`.
        speedup: Full divided by pruned, round by round.
        predicted_prefill: Decoder FLOPs full / pruned of the plan: what prefill could gain.
        predicted_first_token: The same with the vision encoder, which pruning leaves as it is.
    """

    policy: str
    keep: Keep
    visual_tokens_kept: tuple[int, ...]
    latency_ms: Stages
    prune_ms: Spread
    kv_bytes: int
    speedup: Stages
    predicted_prefill: float
    predicted_first_token: float


@dataclass(frozen=True)
class Latency:
    """What was measured.

    Attributes:
        prompt_tokens: S.
        visual_tokens: N.
        new_tokens: Generated in every round, end tokens ignored.
        rounds: Measured rounds, after one that warms up.
        full: Nothing pruned.
        pruned: Every policy.
        peak_memory_bytes: Largest resident memory of the process, in which all sides share one set of
            weights; None where the system does not tell.
    """

    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    rounds: int
    full: Side
    pruned: tuple[PrunedSide, ...]
    peak_memory_bytes: int | None


def measure_latency(
    session: Session,
    visuals: Sequence[Visual],
    prompt: str,
    *,
    keep: Keep | None,
    policies: Sequence[Sequence[str]] = ((),),
    new_tokens: int,
    rounds: int,
    progress: Progress = silent,
) -> Latency:
    """Measure a session.

    Args:
        session: The opened bundle.
        visuals: Pictures of the prompt; without one there is nothing to prune.
        prompt: The question.
        keep: Of the pruned sides; the bundle's when None.
        policies: One side each, as `Session.generate` takes them; an empty one is the bundle's own.
        new_tokens: To generate in every round, at least 2.
        rounds: Measured rounds, at least 3.
        progress: Told about rounds.

    Raises:
        UsageError: No picture, too few rounds or tokens, or a prompt after which nothing can be decoded.
        UserError: See `Session.generate`.
    """
    if not visuals:
        raise UsageError("a benchmark of pruning needs a picture, got none", hint="add --image FILE")
    if rounds < 3 or new_tokens < 2:
        raise UsageError(
            f"got {rounds} rounds of {new_tokens} tokens, expected at least 3 rounds of 2",
            hint="give --rounds 9 --max-new-tokens 16",
        )

    def answer(side: int) -> Generation:
        return session.generate(
            visuals,
            prompt,
            max_new_tokens=new_tokens,
            keep=keep if side else None,
            policies=policies[side - 1] if side else (),
            prune=side > 0,
            ignore_eos=True,
        )

    sides = range(len(policies) + 1)  # the first is the full one
    answers: list[list[Generation]] = [[] for _ in sides]
    progress(_STAGE, 0, rounds)
    for turn in range(rounds + 1):  # the first warms up
        for offset in sides:
            side = (turn + offset) % len(sides)
            generation = answer(side)
            if len(generation.token_ids) < 2:
                raise UsageError(
                    "the prompt fills the model's context, so no token can be decoded",
                    hint="give a smaller picture",
                )
            if turn:
                answers[side].append(generation)
        if turn:
            progress(_STAGE, turn, rounds)
    ready = session.prompts.build(visuals, prompt)
    full, *pruned = answers
    return Latency(
        prompt_tokens=full[0].prompt_tokens,
        visual_tokens=full[0].visual_tokens,
        new_tokens=len(full[0].token_ids),
        rounds=rounds,
        full=Side(_stages(map(_times, full)), _kv_bytes(session, session.prefill(ready, prune=False))),
        pruned=tuple(
            _pruned_side(session, ready, names, full, measured)
            for names, measured in zip(policies, pruned, strict=True)
        ),
        peak_memory_bytes=_peak_memory_bytes(),
    )


def policy_name(session: Session, names: Sequence[str]) -> str:
    """What a side is called: its chooser, or those of its cuts where they differ."""
    choosers = session.bundle.manifest.scheduled(names).cuts
    return ", ".join(dict.fromkeys(cut.chooser.name for cut in choosers))


def _pruned_side(
    session: Session,
    ready: PromptInputs,
    names: Sequence[str],
    full: Sequence[Generation],
    pruned: Sequence[Generation],
) -> PrunedSide:
    manifest, first = session.bundle.manifest, pruned[0]
    text = first.prompt_tokens - first.visual_tokens
    schedule = manifest.scheduled(names)
    kept = tuple(len(cut.kept_index) - text for cut in first.cuts)
    plan = make_plan(
        manifest.dims,
        schedule,
        first.keep,
        visual_tokens=first.visual_tokens,
        text_tokens=text,
        kept=kept,
    )
    ratios = [
        tuple(slow / fast for slow, fast in zip(_times(before), _times(after), strict=True))
        for before, after in zip(full, pruned, strict=True)
    ]
    return PrunedSide(
        policy=policy_name(session, names),
        keep=first.keep,
        visual_tokens_kept=kept,
        latency_ms=_stages(map(_times, pruned)),
        prune_ms=_spread([answer.timings_ms["prune"] for answer in pruned]),
        kv_bytes=_kv_bytes(session, session.prefill(ready, first.keep, names)),
        speedup=_stages(ratios),
        predicted_prefill=plan.prefill_flops.full / plan.prefill_flops.pruned,
        predicted_first_token=first.first_token_flops.full / first.first_token_flops.pruned,
    )


def _kv_bytes(session: Session, prefill: Prefill) -> int:
    elements = sum(math.prod(value.shape) for value in prefill.caches.values())
    return elements * (4 if session.bundle.manifest.precision is Precision.FP32 else 2)


def _times(answer: Generation) -> tuple[float, ...]:
    """Vision, prefill, first token and decode of one answer, in milliseconds."""
    ms = answer.timings_ms
    prefill = ms["embed"] + ms["prefill"] + ms["prune"]
    return ms["vision"], prefill, ms["first_token"], ms["decode_per_token"]


def _stages(rounds: Iterable[tuple[float, ...]]) -> Stages:
    return Stages(*(_spread(values) for values in zip(*rounds, strict=True)))


def _spread(values: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def _peak_memory_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

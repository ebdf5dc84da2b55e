"""How fast a bundle answers, full against pruned: both sides in one run, turn by turn.

An open session, pictures and a question enter; a `Benchmark` leaves. The full side is the same bundle asked
to keep everything, so the two differ in nothing but the number of tokens. Every round measures both, the
order alternating, so that a noisy machine disturbs both alike; ratios are taken round by round.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.bundle import Precision
from ep_export.errors import UsageError
from ep_export.plan import make_plan
from ep_export.policy import Keep
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from ep_export.families.base import Visual
    from ep_export.runtime import Generation, Session

__all__ = ["Benchmark", "Side", "Spread", "Stages", "measure"]

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
        vision: All calls of the vision encoder; the same work on both sides.
        prefill: Embeddings, head and tail over the prompt.
        first_token: From pictures and question to the first token: preparation, vision and prefill.
        decode: One generated token after the first.
    """

    vision: Spread
    prefill: Spread
    first_token: Spread
    decode: Spread


@dataclass(frozen=True)
class Side:
    """One side of the comparison.

    Attributes:
        keep: As an average over layers.
        visual_tokens_kept: k, visual tokens that reach layer K.
        latency_ms: Medians and quartiles.
        kv_bytes: Key and value caches of all layers after prefill, as allocated.
    """

    keep: Keep
    visual_tokens_kept: int
    latency_ms: Stages
    kv_bytes: int


@dataclass(frozen=True)
class Benchmark:
    """What was measured.

    Attributes:
        prompt_tokens: S.
        visual_tokens: N.
        new_tokens: Generated in every round, end tokens ignored.
        rounds: Measured rounds, after one that warms up.
        full: Everything kept.
        pruned: As asked.
        speedup: Full divided by pruned, round by round.
        predicted_prefill: Decoder FLOPs full / pruned of the plan: what prefill could gain.
        peak_memory_bytes: Largest resident memory of the process, in which both sides share one set of
            weights; None where the system does not tell.
    """

    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    rounds: int
    full: Side
    pruned: Side
    speedup: Stages
    predicted_prefill: float
    peak_memory_bytes: int | None


def measure(
    session: Session,
    visuals: Sequence[Visual],
    prompt: str,
    *,
    keep: Keep,
    new_tokens: int,
    rounds: int,
    progress: Progress = silent,
) -> Benchmark:
    """Measure a session.

    Args:
        session: The opened bundle.
        visuals: Pictures of the prompt; without one there is nothing to prune.
        prompt: The question.
        keep: Of the pruned side.
        new_tokens: To generate in every round, at least 2.
        rounds: Measured rounds, at least 3.
        progress: Told about rounds.

    Raises:
        UsageError: No picture, too few rounds or tokens, or a keep that leaves nothing to prune.
        UserError: See `Session.generate`.
    """
    if not visuals:
        raise UsageError("a benchmark of pruning needs a picture, got none", hint="add --image FILE")
    if rounds < 3 or new_tokens < 2:
        raise UsageError(
            f"got {rounds} rounds of {new_tokens} tokens, expected at least 3 rounds of 2",
            hint="give --rounds 9 --max-new-tokens 16",
        )
    sides = (Keep(ratio=1.0), keep)
    made: tuple[list[Generation], list[Generation]] = ([], [])
    progress(_STAGE, 0, rounds)
    for turn in range(rounds + 1):  # the first warms up
        for side in (0, 1) if turn % 2 else (1, 0):
            answer = session.generate(
                visuals, prompt, max_new_tokens=new_tokens, keep=sides[side], ignore_eos=True
            )
            if len(answer.token_ids) < 2:
                raise UsageError(
                    "the prompt fills the model's context, so no token can be decoded",
                    hint="give a smaller picture",
                )
            if turn:
                made[side].append(answer)
        if turn:
            progress(_STAGE, turn, rounds)
    return _summary(session, visuals, prompt, sides, made)


def _summary(
    session: Session,
    visuals: Sequence[Visual],
    prompt: str,
    sides: tuple[Keep, Keep],
    made: tuple[list[Generation], list[Generation]],
) -> Benchmark:
    ready = session.prompts.build(visuals, prompt)
    first = made[0][0]
    text = first.prompt_tokens - first.visual_tokens
    manifest = session.bundle.manifest
    plan = make_plan(
        manifest.dims, manifest.policy, sides[1], visual_tokens=first.visual_tokens, text_tokens=text
    )
    times = [[_times(answer) for answer in answers] for answers in made]

    def side(number: int) -> Side:
        caches = session.prefill(ready, sides[number]).caches
        elements = sum(math.prod(value.shape) for value in caches.values())
        return Side(
            keep=sides[number],
            visual_tokens_kept=len(made[number][0].kept_index) - text,
            latency_ms=_stages(times[number]),
            kv_bytes=elements * (4 if manifest.precision is Precision.FP32 else 2),
        )

    ratios = [
        tuple(slow / fast for slow, fast in zip(full, pruned, strict=True))
        for full, pruned in zip(*times, strict=True)
    ]
    return Benchmark(
        prompt_tokens=first.prompt_tokens,
        visual_tokens=first.visual_tokens,
        new_tokens=len(first.token_ids),
        rounds=len(made[0]),
        full=side(0),
        pruned=side(1),
        speedup=_stages(ratios),
        predicted_prefill=plan.prefill_flops.full / plan.prefill_flops.pruned,
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _times(answer: Generation) -> tuple[float, ...]:
    """Vision, prefill, first token and decode of one answer, in milliseconds."""
    ms = answer.timings_ms
    prefill = ms["embed"] + ms["head_prefill"] + ms["tail_prefill"]
    return ms["vision"], prefill, ms["prepare"] + ms["vision"] + prefill, ms["decode_per_token"]


def _stages(rounds: Sequence[tuple[float, ...]]) -> Stages:
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

"""What a keep means: tokens at every cut, FLOPs to the first token and KV-cache bytes, from the config alone.

Dimensions, a schedule, a keep and the work of the vision encoder enter; a `Plan` leaves. Nothing is loaded,
and torch is not needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ep_export.errors import UsageError
from ep_export.policy import Keep, Nothing, reads_projections

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ep_export.dims import DecoderDims
    from ep_export.policy import Cut, Schedule
    from ep_export.vision_flops import VisionWork

__all__ = [
    "TEXT_TOKENS",
    "Pair",
    "Plan",
    "average_keep",
    "check_keep",
    "check_schedule",
    "kept_tokens",
    "layer_flops",
    "make_plan",
    "settled_keep",
    "span_tokens",
]

TEXT_TOKENS = 86
"""Text tokens of a prompt where nobody says how many: about those of the paper's benchmarks."""

_SLACK = Fraction(1, 10**9)
"""A ratio typed as 0.3333333333333333 means 1/3: this keeps its last digit from costing a token."""


@dataclass(frozen=True)
class Pair:
    """One figure for the full and for the pruned model."""

    full: int
    pruned: int


@dataclass(frozen=True)
class Plan:
    """Budgets of one prompt under one schedule.

    Attributes:
        dims: The decoder's dimensions.
        schedule: Where and how tokens are pruned.
        keep: What was asked for, as an average over layers.
        visual_tokens: N, visual tokens of the prompt.
        text_tokens: All other tokens of the prompt.
        kept_visual_tokens: For every cut the visual tokens that go on.
        prefill_flops: Decoder layers only, multiply and add counted separately (see `layer_flops`).
        visual_kv_bytes: Cache of visual tokens over all layers, in bytes.
        kv_bytes_per_element: Size of one number in the caches.
        vision: What the vision encoder does for the prompt; None where nobody said.
    """

    dims: DecoderDims
    schedule: Schedule
    keep: Keep
    visual_tokens: int
    text_tokens: int
    kept_visual_tokens: tuple[int, ...]
    prefill_flops: Pair
    visual_kv_bytes: Pair
    kv_bytes_per_element: int = 2
    vision: VisionWork | None = None

    @property
    def vision_flops(self) -> int:
        """Of the vision encoder, which pruning in the decoder leaves as it is."""
        return self.vision.flops if self.vision else 0

    @property
    def first_token(self) -> Pair:
        """FLOPs up to the first token: vision encoder and decoder layers, but not lm_head at one position."""
        vision, prefill = self.vision_flops, self.prefill_flops
        return Pair(vision + prefill.full, vision + prefill.pruned)

    @property
    def average_kept(self) -> float:
        """Share of the visual tokens that a layer sees, averaged over all layers; 1 without any."""
        spans = span_tokens(self.schedule, self.dims.layers, self.visual_tokens, self.kept_visual_tokens)
        seen = sum(len(span) * visual for span, visual in spans)
        return seen / (self.dims.layers * self.visual_tokens) if self.visual_tokens else 1.0


def make_plan(
    dims: DecoderDims,
    schedule: Schedule,
    keep: Keep,
    *,
    visual_tokens: int,
    text_tokens: int,
    kv_bytes_per_element: int = 2,
    vision: VisionWork | None = None,
    kept: tuple[int, ...] | None = None,
) -> Plan:
    """Budgets and costs of a prompt.

    Args:
        dims: The decoder's dimensions.
        schedule: Its cuts.
        keep: Average over layers.
        visual_tokens: N.
        text_tokens: Prompt tokens that are not visual.
        kv_bytes_per_element: 2 for a float16 or bfloat16 cache, 4 for float32.
        vision: What the vision encoder does for the prompt; None leaves it out.
        kept: For every cut the visual tokens that went on, where the prompt was answered; else what the keep
            comes to.

    Raises:
        UsageError: Keep or schedule impossible, or negative token counts.
    """
    if visual_tokens < 0 or text_tokens < 0:
        raise UsageError(
            f"token counts are {visual_tokens} visual and {text_tokens} text, expected 0 or more"
        )
    if kept is None and keep.tokens is not None and keep.tokens > visual_tokens > 0:
        raise UsageError(
            f"keep is {keep.tokens} tokens, more than the {visual_tokens} visual tokens there are",
            hint=f"give at most {visual_tokens}",
        )
    if kept is None:
        kept = kept_tokens(keep, schedule, layers=dims.layers, visual_tokens=visual_tokens)
    spans = list(span_tokens(schedule, dims.layers, visual_tokens, kept))
    flops = sum(len(span) * layer_flops(dims, visual + text_tokens) for span, visual in spans)
    kv = 2 * dims.kv_heads * dims.head_dim * kv_bytes_per_element
    return Plan(
        dims=dims,
        schedule=schedule,
        keep=keep,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        kept_visual_tokens=kept,
        prefill_flops=Pair(dims.layers * layer_flops(dims, visual_tokens + text_tokens), flops),
        visual_kv_bytes=Pair(
            dims.layers * visual_tokens * kv, sum(len(span) * visual * kv for span, visual in spans)
        ),
        kv_bytes_per_element=kv_bytes_per_element,
        vision=vision,
    )


def span_tokens(
    schedule: Schedule, layers: int, visual_tokens: int, kept: Sequence[int]
) -> Iterator[tuple[range, int]]:
    """Every span of layers between cuts, with the visual tokens it sees.

    Args:
        schedule: The cuts.
        layers: L.
        visual_tokens: N.
        kept: For every cut the visual tokens that go on; see `kept_tokens`.
    """
    counts = dict(zip((cut.layer for cut in schedule.cuts), kept, strict=True))
    for span in schedule.spans(layers):
        yield span, counts.get(span.start, visual_tokens)


def kept_tokens(keep: Keep, schedule: Schedule, *, layers: int, visual_tokens: int) -> tuple[int, ...]:
    """Visual tokens that go on after every cut, so that the average over all layers is `keep`.

    One cut at layer K: k = floor((L r N - K N) / (L - K)). Several cuts: all shares are scaled by one factor,
    none beyond all tokens, until their average over the layers is r; at the schedule's own average
    (`average_keep`) that is k = floor(share N). At least 1 each, but for `Nothing`: graphs that choose have
    no zero-sized tensors. `Keep.tokens` is r N directly; where a picture has no more tokens than that, all
    are kept.

    Args:
        keep: Average over layers.
        schedule: The cuts.
        layers: L.
        visual_tokens: N; 0 gives zeros.

    Raises:
        UsageError: `keep` is not in (0, 1], not finite, or not within what the cuts can reach; or the
            schedule is impossible (see `check_schedule`).
    """
    check_keep(keep)
    check_schedule(schedule, layers)
    if visual_tokens == 0:
        return (0,) * len(schedule.cuts)
    if keep.tokens is not None:
        average = Fraction(min(keep.tokens, visual_tokens), visual_tokens)
    else:
        average = _exact(keep.ratio)
    return tuple(
        0 if isinstance(cut.chooser, Nothing) else max(1, math.floor(share * visual_tokens + _SLACK))
        for cut, share in zip(
            schedule.cuts, _scaled_shares(average, keep, schedule, layers, visual_tokens), strict=True
        )
    )


def average_keep(schedule: Schedule, *, layers: int) -> Keep:
    """The average over all layers of a schedule whose cuts all have a share.

    Raises:
        UsageError: A cut has none, or the schedule is impossible.
    """
    check_schedule(schedule, layers)
    if any(cut.share is None for cut in schedule.cuts):
        raise UsageError("a cut has no share", hint="give --keep, or --cut LAYER:SHARE for every cut")
    total = schedule.cuts[0].layer + sum(
        count * _exact(cut.share) for cut, count in _layers_after(schedule, layers)
    )
    return Keep(ratio=float(total / layers))


def settled_keep(keep: Keep | None, schedule: Schedule, *, layers: int) -> Keep:
    """What is kept: as told, else what the shares of the cuts come to.

    Raises:
        UsageError: Neither says it.
    """
    if keep is not None:
        return keep
    if any(cut.share is None for cut in schedule.cuts):
        raise UsageError(
            "how much to keep is not given", hint="add --keep 0.25, or --keep-tokens N, or --cut LAYER:SHARE"
        )
    return average_keep(schedule, layers=layers)


def check_schedule(schedule: Schedule, layers: int) -> None:
    """Refuse cuts that no model of so many layers can follow.

    Raises:
        UsageError: No cut, a layer out of range, cuts out of order or equal, shares out of range, missing or
            growing, tokens scored before there is a layer, or a cut after every token is gone.
    """
    if not schedule.cuts:
        raise UsageError("the schedule has no cut", hint="give --layer, or --cut LAYER:SHARE")
    for cut in schedule.cuts:
        _check_cut(cut, layers, alone=len(schedule.cuts) == 1)
    for cut, after in zip(schedule.cuts, schedule.cuts[1:], strict=False):
        if cut.layer >= after.layer:
            raise UsageError(
                f"cut at layer {after.layer} follows one at layer {cut.layer}, expected a later layer",
                hint="give cuts in the order of their layers",
            )
        if isinstance(cut.chooser, Nothing):
            raise UsageError(
                f"cut at layer {after.layer} has no visual token left to choose from",
                hint="a cut that keeps nothing is the last",
            )
        if cut.share is not None and after.share is not None and after.share > cut.share:
            raise UsageError(
                f"share {after.share:g} at layer {after.layer} is more than the {cut.share:g} before it",
                hint="shares are of the prompt's visual tokens: they can only shrink",
            )


def layer_flops(dims: DecoderDims, tokens: int) -> int:
    """FLOPs of one decoder layer over a prompt of n tokens, a multiply and an add counted as two.

    - queries and output: 2 n d (H D) each; keys and values: 2 n d (G D) each, G key/value heads:
      4 n d D (H + G) together
    - scores and their product with the values, every query head its own: 4 n^2 H D
    - gated feed-forward, three matrices: 6 n d m

    With H D = G D = d (multi-head attention) this is the published 8 n d^2 + 4 n^2 d + 6 n d m. Norms, rotary
    embedding, softmax and the score itself are left out, as there.
    """
    n, d = tokens, dims.hidden_size
    projections = 4 * n * d * dims.head_dim * (dims.heads + dims.kv_heads)
    attention = 4 * n * n * dims.heads * dims.head_dim
    return projections + attention + 6 * n * d * dims.ffn_size


def check_keep(keep: Keep) -> None:
    """Refuse a keep that no model can meet.

    Raises:
        UsageError: Not exactly one of ratio and tokens, or out of range, or not a number.
    """
    if (keep.ratio is None) == (keep.tokens is None):
        raise UsageError(
            "keep needs a ratio or a number of tokens", hint="give one of --keep and --keep-tokens"
        )
    if keep.adaptive and (keep.threshold is None or keep.ratio is None):
        raise UsageError(
            f"keep {keep} has no threshold, so nothing says how much each picture keeps",
            hint="build with --calibration RECORD, made at that keep, or with --images DIR to measure it",
        )
    if keep.tokens is not None and keep.tokens < 1:
        raise UsageError(f"keep is {keep.tokens} tokens, expected at least 1", hint="try --keep 0.25")
    if keep.ratio is not None and not 0 < keep.ratio <= 1:
        raise UsageError(f"keep is {keep.ratio:g}, expected 0 < keep <= 1", hint="try --keep 0.25")


def _check_cut(cut: Cut, layers: int, *, alone: bool) -> None:
    first = 1 if reads_projections(cut.chooser) else 0
    if not first <= cut.layer < layers:
        last = layers - 1
        hint = f"give a layer from {first} to {last}" if last >= first else "this model is too small to prune"
        raise UsageError(
            f"layer is {cut.layer}, expected {first} to {last} in a model of {layers}", hint=hint
        )
    nothing = isinstance(cut.chooser, Nothing)
    if cut.share is None:
        if alone or nothing:
            return
        raise UsageError(
            f"cut at layer {cut.layer} has no share",
            hint="with several cuts, give --cut LAYER:SHARE for each",
        )
    if nothing and cut.share != 0:
        raise UsageError(f"share {cut.share:g} at layer {cut.layer} keeps nothing", hint="give share 0")
    if not nothing and not 0 < cut.share <= 1:
        raise UsageError(
            f"share is {cut.share:g} at layer {cut.layer}, expected 0 < share <= 1",
            hint="to drop all visual tokens there, give the policy nothing",
        )


def _layers_after(schedule: Schedule, layers: int) -> list[tuple[Cut, int]]:
    """Every cut with the number of layers from it to the next one."""
    ends = [*(cut.layer for cut in schedule.cuts[1:]), layers]
    return [(cut, end - cut.layer) for cut, end in zip(schedule.cuts, ends, strict=True)]


def _scaled_shares(
    average: Fraction, keep: Keep, schedule: Schedule, layers: int, visual_tokens: int
) -> list[Fraction]:
    """Shares of all cuts, scaled by one factor and capped at 1, whose average over layers is `average`."""
    parts = [
        (Fraction(0) if isinstance(cut.chooser, Nothing) else _exact(cut.share or 1), count)
        for cut, count in _layers_after(schedule, layers)
    ]
    left = layers * average - schedule.cuts[0].layer
    most = sum(count for share, count in parts if share)
    if not -_SLACK <= left <= most + _SLACK:
        raise _out_of_reach(keep, schedule, layers, visual_tokens, most)
    shares = [share for share, _ in parts]
    full: set[int] = set()
    while True:
        weight = sum(share * count for i, (share, count) in enumerate(parts) if i not in full)
        room = left - sum(count for i, (_, count) in enumerate(parts) if i in full)
        factor = room / weight if weight else Fraction(0)
        over = {i for i, share in enumerate(shares) if i not in full and share * factor > 1}
        if not over:
            return [Fraction(1) if i in full else share * factor for i, share in enumerate(shares)]
        full |= over


def _out_of_reach(keep: Keep, schedule: Schedule, layers: int, visual_tokens: int, most: int) -> UsageError:
    first = schedule.cuts[0].layer
    asked = keep.tokens / visual_tokens if keep.tokens is not None else keep.ratio
    if asked is not None and asked * layers > first:
        largest = math.floor((first + most) / layers * 1e4) / 1e4
        return UsageError(
            f"keep is {keep}, above the largest possible, {largest:g}: the cuts drop the rest anyway",
            hint=f"give --keep {largest:g} or less, or prune at later layers",
        )
    tokens = -(-first * visual_tokens // layers)
    ratio = math.ceil(first / layers * 1e4) / 1e4  # rounded up, so that the hint itself is accepted
    smallest = f"{tokens} of {visual_tokens} tokens" if keep.tokens is not None else f"{ratio:g}"
    flag = f"--keep-tokens {tokens}" if keep.tokens is not None else f"--keep {ratio:g}"
    return UsageError(
        f"keep is {keep}, below the smallest possible, {smallest}: {first} of {layers} layers see all tokens",
        hint=f"give {flag} or more, or prune at an earlier layer",
    )


def _exact(ratio: float | None) -> Fraction:
    """The number a person typed: 0.1 means one tenth."""
    return Fraction(repr(float(ratio or 0)))

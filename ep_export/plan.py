"""What a keep ratio means: tokens kept, prefill FLOPs and KV-cache bytes, from the config's numbers alone.

Dimensions, a policy and a keep enter; a `Plan` leaves. Nothing is loaded and torch is not needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ep_export.errors import UsageError

if TYPE_CHECKING:
    from ep_export.dims import DecoderDims
    from ep_export.policy import Keep, Policy

__all__ = ["Pair", "Plan", "check_keep", "check_layer", "kept_tokens", "layer_flops", "make_plan"]

_SLACK = Fraction(1, 10**9)
"""A ratio typed as 0.3333333333333333 means 1/3: this keeps its last digit from costing a token."""


@dataclass(frozen=True)
class Pair:
    """One figure for the full and for the pruned model."""

    full: int
    pruned: int


@dataclass(frozen=True)
class Plan:
    """Budgets of one prompt under one policy.

    Attributes:
        dims: The decoder's dimensions.
        policy: Where and how tokens are pruned.
        keep: What was asked for, as an average over layers.
        visual_tokens: N, visual tokens of the prompt.
        text_tokens: All other tokens of the prompt.
        kept_visual_tokens: k, visual tokens that reach layer K.
        prefill_flops: Decoder layers only, multiply and add counted separately (see `layer_flops`).
        visual_kv_bytes: Cache of visual tokens over all layers, in bytes.
    """

    dims: DecoderDims
    policy: Policy
    keep: Keep
    visual_tokens: int
    text_tokens: int
    kept_visual_tokens: int
    prefill_flops: Pair
    visual_kv_bytes: Pair


def make_plan(
    dims: DecoderDims,
    policy: Policy,
    keep: Keep,
    *,
    visual_tokens: int,
    text_tokens: int,
    kv_bytes_per_element: int = 2,
) -> Plan:
    """Budgets and costs of a prompt.

    Args:
        dims: The decoder's dimensions.
        policy: Its `layer` is K.
        keep: Average over layers.
        visual_tokens: N.
        text_tokens: Prompt tokens that are not visual.
        kv_bytes_per_element: 2 for a float16 or bfloat16 cache, 4 for float32.

    Raises:
        UsageError: Keep or layer out of range, or negative token counts.
    """
    if visual_tokens < 0 or text_tokens < 0:
        raise UsageError(
            f"token counts are {visual_tokens} visual and {text_tokens} text, expected 0 or more"
        )
    if keep.tokens is not None and keep.tokens > visual_tokens > 0:
        raise UsageError(
            f"keep is {keep.tokens} tokens, more than the {visual_tokens} visual tokens there are",
            hint=f"give at most {visual_tokens}",
        )
    kept = kept_tokens(keep, layers=dims.layers, layer=policy.layer, visual_tokens=visual_tokens)
    before, after = policy.layer, dims.layers - policy.layer
    full = layer_flops(dims, visual_tokens + text_tokens)
    pruned = layer_flops(dims, kept + text_tokens)
    kv = 2 * dims.kv_heads * dims.head_dim * kv_bytes_per_element
    return Plan(
        dims=dims,
        policy=policy,
        keep=keep,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        kept_visual_tokens=kept,
        prefill_flops=Pair(dims.layers * full, before * full + after * pruned),
        visual_kv_bytes=Pair(dims.layers * visual_tokens * kv, (before * visual_tokens + after * kept) * kv),
    )


def kept_tokens(keep: Keep, *, layers: int, layer: int, visual_tokens: int) -> int:
    """Visual tokens k that layers K..L-1 see, so that the average over all layers is `keep`.

    k = floor((L r N - K N) / (L - K)), at least 1: the graphs have no zero-sized tensors. `Keep.tokens` is
    r N directly; where a picture has no more tokens than that, all are kept.

    Args:
        keep: Average over layers.
        layers: L.
        layer: K, 1 <= K < L.
        visual_tokens: N; 0 gives 0.

    Raises:
        UsageError: `keep` is not in (0, 1], not finite, or below K / L, which layers 0..K-1 use up alone.
    """
    check_keep(keep)
    check_layer(layer, layers)
    if visual_tokens == 0:
        return 0
    if keep.tokens is not None:
        average = Fraction(min(keep.tokens, visual_tokens))
    else:
        average = Fraction(repr(keep.ratio)) * visual_tokens  # repr: 0.1 means one tenth
    share = (layers * average - layer * visual_tokens) / (layers - layer) + _SLACK
    if share < 0:
        raise _too_small(keep, layers, layer, visual_tokens)
    return max(1, math.floor(share))


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
    if keep.tokens is not None and keep.tokens < 1:
        raise UsageError(f"keep is {keep.tokens} tokens, expected at least 1", hint="try --keep 0.25")
    if keep.ratio is not None and not 0 < keep.ratio <= 1:
        raise UsageError(f"keep is {keep.ratio:g}, expected 0 < keep <= 1", hint="try --keep 0.25")


def check_layer(layer: int, layers: int) -> None:
    """Refuse a split that leaves one half of the decoder empty.

    Raises:
        UsageError: Not 1 <= layer < layers.
    """
    if not 1 <= layer < layers:
        hint = f"give a layer from 1 to {layers - 1}" if layers > 1 else "this model is too small to prune"
        raise UsageError(f"layer is {layer}, expected 1 to {layers - 1} in a model of {layers}", hint=hint)


def _too_small(keep: Keep, layers: int, layer: int, visual_tokens: int) -> UsageError:
    tokens = -(-layer * visual_tokens // layers)
    ratio = math.ceil(layer / layers * 1e4) / 1e4  # rounded up, so that the hint itself is accepted
    smallest = f"{tokens} of {visual_tokens} tokens" if keep.tokens is not None else f"{ratio:g}"
    flag = f"--keep-tokens {tokens}" if keep.tokens is not None else f"--keep {ratio:g}"
    return UsageError(
        f"keep is {keep}, below the smallest possible, {smallest}: {layer} of {layers} layers see all tokens",
        hint=f"give {flag} or more, or an earlier --layer",
    )

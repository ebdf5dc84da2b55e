"""Cache memory of requests: rows a span, bytes, and how many requests fit. From the manifest alone.

A row holds one position's keys and values in every layer of a span. Before the first cut a request needs a
row for every prompt token, behind a cut only for those that were kept, and everywhere one for every generated
token but the last, which is never fed back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.errors import UserError
from ep_export.numerics import TYPES
from ep_export.planning import kept_tokens, span_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ep_export.bundle import Component, Manifest
    from ep_export.policy import Keep, Schedule

__all__ = ["CacheNeed", "cache_need", "requests_that_fit", "row_bytes"]

_KEY, _VALUE = ".key", ".value"


@dataclass(frozen=True)
class CacheNeed:
    """What one request keeps in caches until its answer is complete.

    Attributes:
        rows: For every span.
        bytes: Over all spans.
    """

    rows: tuple[int, ...]
    bytes: int


def cache_need(
    manifest: Manifest,
    schedule: Schedule | None,
    *,
    prompt_tokens: int,
    visual_tokens: int,
    kept: Sequence[int],
    max_new_tokens: int,
) -> CacheNeed:
    """Rows and bytes of a request.

    Args:
        manifest: The bundle's.
        schedule: From `Manifest.scheduled`; None where nothing is pruned.
        prompt_tokens: S.
        visual_tokens: N, of the prompt tokens.
        kept: For every cut of the schedule the visual tokens that go on; see `kept_tokens`.
        max_new_tokens: Longest answer.
    """
    text_tokens, answer = prompt_tokens - visual_tokens, max_new_tokens - 1
    if schedule is None:
        visual = [visual_tokens] * len(manifest.spans)
    else:
        visual = [count for _, count in span_tokens(schedule, manifest.dims.layers, visual_tokens, kept)]
    rows = tuple(text_tokens + count + answer for count in visual)
    return CacheNeed(rows, sum(map(math.prod, zip(rows, row_bytes(manifest), strict=True))))


def requests_that_fit(
    manifest: Manifest,
    cache_bytes: int,
    *,
    prompt_tokens: int,
    visual_tokens: int,
    max_new_tokens: int,
    keep: Keep | None = None,
    policies: Sequence[str] = (),
    prune: bool = True,
) -> int:
    """How many equal requests a given cache memory holds at once.

    Args:
        manifest: The bundle's.
        cache_bytes: Memory for keys and values.
        prompt_tokens: S, of each request.
        visual_tokens: N, of the prompt tokens.
        max_new_tokens: Longest answer.
        keep: Amount kept; the bundle's when None.
        policies: Which of the bundle's policies; see `Manifest.scheduled`.
        prune: False for the unpruned model.

    Raises:
        UserError: `keep` is impossible, a policy is not there, or more tokens are visual than there are.
    """
    if not 0 <= visual_tokens <= prompt_tokens:
        raise UserError(
            f"prompt has {visual_tokens} visual tokens of {prompt_tokens}, expected 0 to {prompt_tokens}"
        )
    schedule = manifest.pruned_to(keep, policies) if prune else None
    kept: tuple[int, ...] = ()
    if schedule is not None:
        kept = kept_tokens(
            (keep or manifest.keep_for(schedule)).largest,
            schedule,
            layers=manifest.dims.layers,
            visual_tokens=visual_tokens,
        )
    need = cache_need(
        manifest,
        schedule,
        prompt_tokens=prompt_tokens,
        visual_tokens=visual_tokens,
        kept=kept,
        max_new_tokens=max_new_tokens,
    )
    return cache_bytes // need.bytes


def row_bytes(manifest: Manifest) -> tuple[int, ...]:
    """Bytes of one row in every span: keys and values of one position in all its layers."""
    return tuple(_row_bytes(manifest, span) for span in manifest.spans)


def _row_bytes(manifest: Manifest, span: Component) -> int:
    bits = [TYPES[spec.dtype].bits for spec in span.inputs if spec.name.endswith((_KEY, _VALUE))]
    return sum(bits) // 8 * manifest.dims.kv_heads * manifest.dims.head_dim

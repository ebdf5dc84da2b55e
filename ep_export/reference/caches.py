"""What a Hugging Face cache has to remember once layers hold different tokens of one prompt.

The notes live on the cache itself, so that a deep copy of it (Hugging Face's way to reuse a prompt) takes
them along.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ep_export.errors import UserError

__all__ = ["note_columns", "past_columns", "plain_length"]

_COLUMNS = "ep_export_columns"
"""Attribute of a cache: cut layer -> columns of the full-length cache that the layers from it on hold."""


def plain_length(cache: Any) -> int:
    """Tokens that were fed to a growing cache, dropped ones included.

    Raises:
        UserError: The cache is static, sliding or of another kind: its masks cannot be cut by column.
    """
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", True) or any(getattr(cache, "is_sliding", [True])):
        raise UserError(
            f"a {type(cache).__name__} that is static or sliding cannot be pruned",
            hint="leave cache_implementation out; the default DynamicCache grows",
        )
    return int(cache.get_seq_length())


def past_columns(cache: Any, layer: int, past: int, *, cuts: tuple[int, ...]) -> torch.Tensor:
    """Columns of the full-length cache that the layers from a cut on hold.

    Args:
        cache: A growing cache, or None.
        layer: The cut's.
        past: Tokens fed before this forward.
        cuts: Layers of all cuts.

    Returns:
        [P] int64 ascending, on the CPU; all of 0..past-1 where none was dropped.

    Raises:
        UserError: The cache was pruned at other layers.
    """
    every = torch.arange(past)
    if cache is None or not past:  # notes on an empty cache are left over from before it was reset
        return every
    notes: dict[int, torch.Tensor] = getattr(cache, _COLUMNS, {})
    columns = notes.get(layer, every)
    held, hint = (
        _held(cache, layer),
        "a cache pruned at some layers cannot go on at others; start from the prompt",
    )
    if not notes.keys() <= set(cuts):
        before, now = (", ".join(map(str, sorted(layers))) for layers in (notes, cuts))
        raise UserError(
            f"the cache was pruned at layers {before}, expected {now} as in this block", hint=hint
        )
    if held != len(columns):
        raise UserError(f"the cache holds {held} tokens at layer {layer}, expected {len(columns)}", hint=hint)
    return columns


def note_columns(cache: Any, layer: int, columns: torch.Tensor, length: int, *, fresh: bool) -> None:
    """Remember what the layers from a cut on hold after this forward.

    Args:
        cache: A growing cache.
        layer: The cut's.
        columns: [P + M] int64 of the full-length cache, on the CPU.
        length: Of the full-length cache.
        fresh: Whether the cache was empty before, so that earlier notes are left over.
    """
    notes = {} if fresh else dict(getattr(cache, _COLUMNS, {}))
    if len(columns) < length:
        notes[layer] = columns
    setattr(cache, _COLUMNS, notes)
    if layer == 0:
        _tell_full_length(cache, length - len(columns))


class _ShortLayer(DynamicLayer):  # type: ignore[misc]  # transformers' base is untyped
    """Layer 0's cache where a cut stands before it: it tells the length that was fed, not the one it holds.

    Hugging Face counts positions and mask columns from layer 0's cache.

    Attributes:
        missing: Columns that were fed and dropped.
    """

    missing: int = 0

    def get_seq_length(self) -> int:
        """Tokens fed."""
        held = int(super().get_seq_length())
        return held + self.missing if held else 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.missing = 0


def _tell_full_length(cache: Any, missing: int) -> None:
    """Make layer 0 of a cache a `_ShortLayer`, keeping what it holds."""
    if not cache.layers:  # a cache made without a config grows its layers as they come
        cache.layers.append(_ShortLayer())
    first = cache.layers[0]
    if missing and not isinstance(first, _ShortLayer):
        short = _ShortLayer()
        short.__dict__.update(first.__dict__)
        cache.layers[0] = first = short
    if isinstance(first, _ShortLayer):
        first.missing = missing


def _held(cache: Any, layer: int) -> int:
    """Columns a layer really holds."""
    if layer >= len(cache.layers) or not cache.layers[layer].is_initialized:
        return 0
    return int(cache.layers[layer].keys.shape[-2])

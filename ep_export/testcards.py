"""Deterministic pictures for checks that were given none: smooth colour fields, edges and grain.

They only have to exercise every window layout of a vision encoder. What a policy costs in accuracy must
be measured on real pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = ["SIZES", "make_cards"]

SIZES: tuple[tuple[int, int], ...] = ((224, 224), (336, 196), (140, 280))
"""(width, height): square, wide and tall, none a multiple of every window size."""


def make_cards(sizes: Sequence[tuple[int, int]] = SIZES, *, seed: int = 0) -> tuple[Image.Image, ...]:
    """One RGB picture for each (width, height), the same on every machine."""
    generator = np.random.default_rng(seed)
    return tuple(_card(width, height, generator) for width, height in sizes)


def _card(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = generator.uniform(0.005, 0.06, size=(3, 2))
    phase = generator.uniform(0, 2 * np.pi, size=3)
    card = np.stack([np.sin(fx * x + fy * y + p) for (fx, fy), p in zip(waves, phase, strict=True)], axis=-1)
    for _ in range(6):  # rectangles give the encoder edges to see
        left, top = generator.integers(width), generator.integers(height)
        card[top : top + height // 4, left : left + width // 5] += generator.uniform(-1, 1, size=3)
    card += generator.normal(scale=0.1, size=card.shape)
    return Image.fromarray(np.clip(127.5 + 70 * card, 0, 255).astype(np.uint8))

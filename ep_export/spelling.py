"""Shares, policies and cuts as people write them."""

from __future__ import annotations

import math

from ep_export.errors import UsageError
from ep_export.policy import Chooser, Cut, Nothing, Scorer, Select, TopK, chooser_named

__all__ = ["parse_chooser", "parse_cut", "parse_share"]


def parse_share(text: str) -> float:
    """0.25, or 25%.

    Raises:
        ValueError: Neither.
    """
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def parse_chooser(name: str) -> Chooser:
    """A policy's name; a score alone means its highest.

    Raises:
        UsageError: There is no such policy.
    """
    return chooser_named(f"{name}-{Select.HIGHEST.value}" if name in set(Scorer) else name)


def parse_cut(text: str) -> Cut:
    """`LAYER:SHARE[:NAME]`, e.g. `2:0.5:divprune`.

    Raises:
        UsageError: It is none.
    """
    layer, _, rest = text.partition(":")
    share, _, name = rest.partition(":")
    chooser = parse_chooser(name) if name else TopK()
    try:
        cut = Cut(int(layer), chooser, parse_share(share))
    except ValueError:
        raise UsageError(
            f"--cut {text!r} is not LAYER:SHARE or LAYER:SHARE:NAME", hint="e.g. --cut 2:0.25:divprune"
        ) from None
    lowest = 0.0 if isinstance(chooser, Nothing) else math.ulp(0.0)
    if not lowest <= (cut.share or 0.0) <= 1:
        raise UsageError(
            f"--cut {text!r} keeps a share of {cut.share:g}, expected 0 < share <= 1",
            hint="to drop all visual tokens at a layer: --cut LAYER:0:nothing",
        )
    return cut

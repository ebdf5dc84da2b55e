"""Pausing Python's cyclic garbage collector while large libraries load.

They make millions of objects that live on; the collector walks them again and again and finds nothing, a
tenth of the time that opening a checkpoint takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic collection within the block; reference counting goes on. Nests."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

"""Tiny bundles of every family, made once a session when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from bundles import export_tiny
from family_bundles import MAKERS, PRECISIONS

from ep_export.bundle import Bundle, Dialect

BundleOf = Callable[..., Bundle]


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """A family's bundle: K = 1, keep 0.75, the paper's policy."""

    @cache
    def checkpoint(family: str) -> Path:
        return MAKERS[family](tmp_path_factory.mktemp(family) / "checkpoint")

    @cache
    def make(family: str, dialect: Dialect) -> Bundle:
        out = tmp_path_factory.mktemp(family) / "bundle"
        return export_tiny(checkpoint(family), out, layer=1, dialect=dialect, precision=PRECISIONS[dialect])

    return make

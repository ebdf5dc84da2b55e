"""Shared by the tests of validation: a bundle in half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from ep_export.bundle import Bundle


@pytest.fixture(scope="session")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """K = 1: states are scored before any token has seen another, so equal patches tie."""
    from bundles import export_tiny

    from ep_export.bundle import Precision

    out = tmp_path_factory.mktemp("half") / "bundle"
    return export_tiny(tiny_checkpoint, out, layer=1, keep=0.5, precision=Precision.FP16)

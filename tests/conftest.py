"""Shared by every area: one tiny checkpoint and one tiny bundle a session, made when first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ep_export.bundle import Bundle


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL: 4 layers, 4 heads of 16, 2 key/value heads, repetition penalty 1.05."""
    from tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint", repetition_penalty=1.05)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """That checkpoint exported: K = 2, the paper's policy, keep 0.75, fp32, portable dialect."""
    from bundles import export_tiny

    return export_tiny(tiny_checkpoint, tmp_path_factory.mktemp("tiny-bundle") / "bundle", layer=2)

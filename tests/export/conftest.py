"""Checkpoints and bundles shared by the export tests: each is made once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from bundles import export_tiny
from tiny import make_tiny
from tiny_llava import make_tiny_llava, make_tiny_llava_next
from tiny_llava_onevision import make_tiny_llava_onevision
from tiny_smolvlm import make_tiny_smolvlm
from tiny_video_llava import make_tiny_video_llava

from ep_export.bundle import Bundle

MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": lambda path: make_tiny(path, layers=3, heads=6, kv_heads=2, head_dim=16),
    "qwen2_5_vl, odd heads": lambda path: make_tiny(path, layers=4, heads=7, kv_heads=1, head_dim=40),
    "qwen2_5_vl, deep": lambda path: make_tiny(path, layers=9, heads=16, kv_heads=4, head_dim=16),
    "qwen2_5_vl, wide heads": lambda path: make_tiny(path, layers=3, heads=4, kv_heads=4, head_dim=128),
    "qwen2_vl": lambda path: make_tiny(path, model_type="qwen2_vl"),
    "llava": make_tiny_llava,
    "llava, mistral": lambda path: make_tiny_llava(path, text={"model_type": "mistral"}),
    "llava_next": make_tiny_llava_next,
    "llava_onevision": make_tiny_llava_onevision,
    "smolvlm": make_tiny_smolvlm,
    "video_llava": make_tiny_video_llava,
}


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint by its name in `MAKERS`."""

    @cache
    def make(name: str) -> Path:
        return MAKERS[name](tmp_path_factory.mktemp("model") / "checkpoint")

    return make


@pytest.fixture(scope="session")
def bundle_of(
    checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """A bundle of such a checkpoint; see `export_tiny` for the rest."""

    @cache
    def make(name: str, **how: Any) -> Bundle:
        return export_tiny(checkpoint_of(name), tmp_path_factory.mktemp("bundles") / "bundle", **how)

    return make

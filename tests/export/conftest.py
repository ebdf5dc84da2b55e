"""Bundles shared by the export tests: each is built once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from export_helpers import build
from tiny import make_tiny

from ep_export.bundle import Bundle, Dialect, Precision
from ep_export.policy import Policy

Shape = tuple[int, int, int, int]  # layers, heads, kv_heads, head_dim


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], Path]:
    """A random checkpoint of a shape."""

    @cache
    def make(shape: Shape) -> Path:
        layers, heads, kv_heads, head_dim = shape
        path = tmp_path_factory.mktemp("model")
        return make_tiny(path, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    return make


@pytest.fixture(scope="session")
def bundle_of(
    checkpoint_of: Callable[[Shape], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """A bundle of a shape, pruned at a layer, in a dialect and precision."""

    @cache
    def build_once(shape: Shape, layer: int, dialect: Dialect, precision: Precision) -> Bundle:
        out = tmp_path_factory.mktemp("bundles") / "bundle"
        return build(checkpoint_of(shape), out, Policy(layer), dialect=dialect, precision=precision)

    def make(
        shape: Shape, layer: int, dialect: Dialect = Dialect.PORTABLE, precision: Precision = Precision.FP32
    ) -> Bundle:
        return build_once(shape, layer, dialect, precision)

    return make

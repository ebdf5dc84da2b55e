"""Imports run one way along the data flow, and what runs on a Jetson imports no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ep_export"

# A module may import its own package and whatever stands on a lower line.
LAYERS = (
    ("errors", "interrupts"),
    ("dims", "policy", "numerics", "progress", "garbage", "vision_flops"),
    ("documents", "page", "planning", "graph", "spelling", "weight_sizes"),
    ("safetensors_index",),
    ("adaptive", "data", "ownership", "bundle", "links", "testcards", "aliases"),
    ("targets", "staging"),
    ("families", "entropy", "engine_record", "weights"),
    ("checkpoint", "plugin", "choosers", "first_token"),
    ("reference", "runtime", "fit", "first_token_budget", "methods"),
    ("serving",),
    ("export", "benchmark", "package", "serve", "measure", "what_fits"),
    ("calibrate",),
    ("validate", "harness"),
    ("engine",),
    ("building", "catalog", "sweep"),
    ("api", "cli"),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports_of(file: Path) -> Iterator[str]:
    """Top-level names under ep_export that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "ep_export"
                else [node.module]
            )
        for name in names:
            if name.startswith("ep_export."):
                yield name.split(".")[1]


def unit_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def test_every_unit_has_its_place():
    assert {unit_of(file) for file in FILES} <= set(RANK)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_data_flow(file):
    unit = unit_of(file)
    for imported in imports_of(file):
        if imported in RANK and imported != unit:
            assert RANK[imported] < RANK[unit], f"{unit} imports {imported}"


@pytest.mark.parametrize(
    "module",
    [
        "ep_export.bundle",
        "ep_export.checkpoint",
        "ep_export.cli.main",
        "ep_export.families",
        "ep_export.planning",
        "ep_export.runtime",
        "ep_export.serving",
    ],
)
def test_what_a_jetson_needs_imports_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True)

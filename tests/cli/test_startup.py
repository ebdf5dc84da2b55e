"""Help answers at once: nothing heavy is imported for it."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "polygraphy",
    "matplotlib",
    "numpy",
)
VERBS = ("models", "targets", "plan", "calibrate", "build", "export", "compile", "validate", "run", "inspect")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['ep-export', '--help']\n"
        "from ep_export.cli import main\n"
        "try: main()\n"
        f"except SystemExit: print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_help_lists_every_verb():
    result = subprocess.run(
        [sys.executable, "-m", "ep_export", "--help"], capture_output=True, text=True, check=True
    )
    for verb in VERBS:
        assert f"\n  {verb}" in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_its_options(verb):
    result = subprocess.run(
        [sys.executable, "-m", "ep_export", verb, "-h"], capture_output=True, text=True, check=True
    )
    assert "--json" in result.stdout

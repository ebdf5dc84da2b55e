"""What a Jetson does, under the Pythons of JetPack: `make test-pythons`.

JetPack 6 brings Python 3.10, JetPack 7 brings 3.12; the project's own environment has another one. For every
interpreter that can be had, pip fills an environment anew from the wheel, without torch; in it everything
that must not need torch is imported with warnings as errors, and a bundle is checked, asked and measured. Its
answer must be the one this interpreter gives. What could not be had is listed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from follow_docs import ROOT, build_wheel, runner_environment

PYTHONS = ("3.10", "3.11", "3.12")
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
TARGET = "jetson-orin-nx-16gb"
# What has to work without torch: these, and all that is in some of them.
IMPORT_ALL = """
import importlib, pkgutil, sys

sys.modules["torch"] = None
inner = ["benchmark", "package", "page", "plugin", "runtime", "serving"]
alone = ["bundle", "checkpoint", "cli.main", "families", "first_token", "fit", "planning", "targets"]
for name in (f"ep_export.{name}" for name in inner + alone):
    print(importlib.import_module(name).__name__)
for name in (f"ep_export.{name}" for name in inner):
    for module in pkgutil.walk_packages(sys.modules[name].__path__, f"{name}."):
        print(importlib.import_module(module.name).__name__)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pythons")
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    wheel = build_wheel(work / "wheel")
    ask = ["run", str(options.bundle.resolve()), "--image", str(options.picture.resolve())]
    ask += ["--prompt", options.question, "--json"]
    expected = json.loads(output_of([sys.executable, "-m", "ep_export", *ask], ROOT))["token_ids"]
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    failed = 0
    for version in PYTHONS:
        python = interpreter(version)
        if version == own or python is None:
            print(f"left out: Python {version}, {'the project own' if version == own else 'not found'}")
            continue
        began = time.monotonic()
        try:
            environment = runner_environment(work / version, wheel, python)
            said = follow(environment / "bin/python", options.bundle.resolve(), ask, expected, work)
        except (subprocess.CalledProcessError, ValueError) as error:
            said, failed = f"FAIL {error}\n{getattr(error, 'stderr', '')}", failed + 1
        print(f"Python {version} ({python}), {time.monotonic() - began:.0f} s: {said}", flush=True)
    return 1 if failed else 0


def interpreter(version: str) -> str | None:
    """One that starts: on PATH (pyenv leaves names there that do not), or one of pyenv's."""
    named = [f"python{version}", *map(str, PYENV.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, map(shutil.which, named)):
        ask = "import sys, venv; print(sys.executable, '%d.%d' % sys.version_info[:2])"
        started = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False)
        path, _, told = started.stdout.strip().rpartition(" ")
        if started.returncode == 0 and told == version:
            return path
    return None


def follow(python: Path, bundle: Path, ask: Sequence[str], expected: Sequence[int], work: Path) -> str:
    """What a Jetson does.

    Raises:
        CalledProcessError: A command failed.
        ValueError: The answer is another one.
    """
    modules = output_of([python, "-W", "error", "-c", IMPORT_ALL], work).split()
    export = [python, "-m", "ep_export"]
    plan = ["plan", "--model", "qwen2.5-vl-7b", "--keep", "0.25", "--weights", "int4", "--target", TARGET]
    output_of([*export, "inspect", str(bundle), "--verify"], work)
    output_of([*export, *plan], work)
    tokens = json.loads(output_of([*export, *ask], work))["token_ids"]
    if tokens != list(expected):
        raise ValueError(f"answers {tokens}, expected {list(expected)}")
    output_of([*export, "bench", str(bundle), "--rounds", "3", "--max-new-tokens", "2"], work)
    return f"{len(modules)} modules imported; checked, planned, answered as here, measured"


def output_of(command: Sequence[str | Path], folder: Path) -> str:
    """Standard output, from a folder that is not the repository."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    return subprocess.run(command, cwd=folder, env=clean, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())

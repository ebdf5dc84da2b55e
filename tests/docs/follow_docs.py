"""Follow README and docs word by word, as a newcomer would: `make test-docs`.

Two environments, both from the wheel and without the repository: one with what building needs (packages are
borrowed from the environment that runs this script), and one that pip fills anew and that has no torch, in
which every verb runs that must not need it. In a folder with the model and the pictures that the pages name,
every line of a `console` block is typed and every `python` block is run, page after page.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "docs/tutorial.md",
    "docs/choosing.md",
    "docs/weights.md",
    "docs/jetson.md",
    "docs/comparing.md",
    "README.md",
)
WITHOUT_TORCH = {"plan", "run", "bench", "policy list", "targets", "models", "inspect"}
PICTURES = 12
FENCE = re.compile(r"^```(?P<kind>console|python)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
EXITS = re.compile(r"\s+# exits (\d+)$")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "docs-test")
    parser.add_argument("--page", action="append", help="only these [all]")
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    wheel = build_wheel(work / "wheel")
    builder, runner = builder_environment(work / "builder", wheel), runner_environment(work / "runner", wheel)
    desk = work / "desk"
    lay_out(desk)
    failed = 0
    for page in options.page or PAGES:
        for kind, text in blocks(ROOT / page):
            for line in commands(text) if kind == "console" else [text]:
                failed += not follow(page, kind, line, desk, builder, runner)
    print(f"{failed} failed")
    return 1 if failed else 0


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield match["kind"], match["body"]


def commands(text: str) -> list[str]:
    """What stands behind a prompt; the rest is what was printed. A backslash goes on in the next line."""
    joined = text.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def follow(page: str, kind: str, line: str, desk: Path, builder: Path, runner: Path) -> bool:
    """Type one command, or run one block of Python; prints how it went."""
    told = EXITS.search(line)
    expected = int(told[1]) if told else 0
    needs_torch = kind == "console" and not any(
        line.startswith(f"ep-export {verb}") for verb in WITHOUT_TORCH
    )
    needs_torch |= "prune(" in line or "build(" in line
    environment = builder if needs_torch else runner
    command = (
        ["bash", "-c", EXITS.sub("", line)] if kind == "console" else [environment / "bin/python", "-c", line]
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=desk,
        env={**clean, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    good = done.returncode == expected
    first = line.strip().splitlines()[0]
    where = "with torch" if needs_torch else "no torch"
    print(
        f"{'ok  ' if good else 'FAIL'} {time.monotonic() - began:5.1f} s  {page}  [{where}]  {first}",
        flush=True,
    )
    if not good:
        print(f"exit {done.returncode}, expected {expected}\n{done.stdout}{done.stderr}", flush=True)
    return good


def build_wheel(out: Path) -> Path:
    pip("wheel", "--no-deps", "--wheel-dir", str(out), str(ROOT))
    (wheel,) = out.glob("*.whl")
    return wheel


def builder_environment(path: Path, wheel: Path) -> Path:
    """The wheel, over the packages of this environment (not its links to the repository)."""
    new_environment(path)
    pip("--python", str(path / "bin/python"), "install", "--no-deps", str(wheel))
    site = next(path.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return path


def runner_environment(path: Path, wheel: Path) -> Path:
    """The wheel with what its metadata asks for, and nothing else."""
    new_environment(path)
    constraints = str(ROOT / "constraints.txt")
    pip("--python", str(path / "bin/python"), "install", f"{wheel}[cpu]", "-c", constraints)
    missing = subprocess.run([path / "bin/python", "-c", "import torch"], capture_output=True, check=False)
    if missing.returncode == 0:
        raise SystemExit("the environment without torch has torch")
    return path


def new_environment(path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)


def pip(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True
    )


def lay_out(desk: Path) -> None:
    """What the pages speak of: the model, a folder of pictures with questions, and a photo."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "digit-reader", desk / "digit-reader")
    scenes = [sys.executable, ROOT / "tests" / "fixtures" / "digit_scenes.py"]
    split = ["--split", "calibration", "--answers"]
    subprocess.run(
        [*scenes, desk / "pictures", "--count", str(PICTURES), *split], check=True, capture_output=True
    )
    subprocess.run(
        [*scenes, desk / "unseen", "--count", "1", "--split", "test"], check=True, capture_output=True
    )
    (photo,) = (desk / "unseen").glob("*.png")
    shutil.copy(photo, desk / "photo.png")
    shutil.rmtree(desk / "unseen")


if __name__ == "__main__":
    sys.exit(main())

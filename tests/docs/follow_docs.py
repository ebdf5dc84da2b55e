"""Follow README and docs word by word, as a newcomer would: `make test-docs`.

Two environments, both from the wheel and without the repository: one with what building needs (packages are
borrowed from the environment that runs this script), and one that pip fills anew and that has no torch, in
which every verb runs that must not need it. In a folder with the model and the pictures that the pages name,
every line of a `console` block is typed and every `python` block is run, page after page. What stands below a
command in its block is what it prints: every line of it must be there (`...` stands for others).

What a page's comments tell its readers holds here too:

    # exits 3                       the command is to end with that code
    # goes on                       it is left running until the page ends; what comes next is typed once
                                    it has printed what it is to print
    # not run by the tests: WHY     the line, or the block of a script, is left out and listed

A block of commands that is neither typed nor says why it is not (`shell`, `bash`, `py`) is a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
PAGES = (
    "docs/tutorial.md",
    "docs/choosing.md",
    "docs/weights.md",
    "docs/jetson.md",
    "docs/comparing.md",
    "docs/serving.md",
    "docs/many-machines.md",
    "README.md",
)
WITHOUT_TORCH = {"plan", "run", "bench", "serve", "policy list", "targets", "models", "inspect"}
# Of pip and other tools: on a machine that builds, or measures.
BUILDS = re.compile(r"\b(torch|ray|accelerate)\b|[\[,]export\b")
PICTURES = 12
START_SECONDS = 120  # a loaded machine imports transformers for a while
END_SECONDS = 40  # Ray lets work finish for 30
FENCE = re.compile(r"^```(?P<kind>console|python|shell|bash|py)\n(?P<body>.*?)^```$", re.M | re.DOTALL)
EXITS = re.compile(r"\s+# exits (\d+)$")
GOES_ON = re.compile(r"\s+# goes on\b.*$")
NOT_RUN = re.compile(r"#.*\bnot run by the tests: (.+?)\)?$", re.M)


@dataclass(frozen=True)
class Step:
    """What a reader types, or runs as Python.

    Attributes:
        page: Where it stands.
        kind: `console` or `python`.
        text: A command line, or a program.
        printed: What the page says it prints.
        left_out: Why it is not run here; else empty.
    """

    page: str
    kind: str
    text: str
    printed: str = ""
    left_out: str = ""

    @property
    def needs_torch(self) -> bool:
        if self.kind == "python":
            return "prune(" in self.text or "build(" in self.text
        if "ep-export " not in self.text:
            return BUILDS.search(self.text) is not None
        return not any(f"ep-export {verb}" in self.text for verb in WITHOUT_TORCH)

    def is_printed_in(self, output: str) -> bool:
        """Whether every line that the page shows is there."""
        return all(line in output for line in self.printed.splitlines() if line != "...")

    def say(self, outcome: str, remark: str) -> None:
        where = "with torch" if self.needs_torch else "no torch"
        print(f"{outcome} {remark}  {self.page}  [{where}]  {self.text.strip().splitlines()[0]}", flush=True)


@dataclass(frozen=True)
class Background:
    """A command that goes on: its step, its process and the file it prints to."""

    step: Step
    process: subprocess.Popen[str]
    output: Path


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
    began = time.monotonic()
    failed = sum(follow_page(page, desk, builder, runner) for page in options.page or PAGES)
    failed += not plugin_sources_are_there(desk, runner)
    print(f"{failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def follow_page(page: str, desk: Path, builder: Path, runner: Path) -> int:
    """Everything on a page, in order; what goes on is ended with it. Returns how much failed."""
    failed = 0
    running: list[Background] = []
    try:
        for step in steps(page):
            environment = builder if step.needs_torch else runner
            if step.left_out:
                step.say("left", f"out: {step.left_out}")
            elif step.kind not in {"console", "python"}:
                step.say("FAIL", f"a block of {step.kind} that does not say why it is not run")
                failed += 1
            elif GOES_ON.search(step.text):
                running.append(start(step, desk / f"background-{len(running)}.log", desk, environment))
                failed += not ready(running[-1])
            else:
                failed += not follow(step, desk, environment)
    finally:
        failed += sum(not end(background) for background in reversed(running))
    return failed


def plugin_sources_are_there(desk: Path, runner: Path) -> bool:
    """`plugin build` from a wheel fails for lack of headers or a tool: a line, and a hint to act on."""
    step = Step("(plugin)", "console", "TENSORRT_ROOT=nowhere ep-export plugin build")
    with spawn(step, desk, runner, subprocess.PIPE) as process:
        output, _ = process.communicate()
    files = [Path(name) for name in re.findall(r"-r (\S+requirements\S*\.txt)", output)]
    lines = [line.split(":")[0] for line in output.splitlines()]
    good = process.returncode == 1 and lines == ["error", "hint"] and all(file.is_file() for file in files)
    step.say("ok  " if good else "FAIL", "      ")
    if not good:
        print(output, flush=True)
    return good


def steps(page: str) -> Iterator[Step]:
    for block in FENCE.finditer((ROOT / page).read_text(encoding="utf-8")):
        kind, body = block["kind"], block["body"]
        for text, printed in commands(body) if kind == "console" else [(body, "")]:
            told = NOT_RUN.search(text)
            yield Step(page, kind, text, printed, told[1] if told else "")


def commands(body: str) -> Iterator[tuple[str, str]]:
    """What stands behind a prompt, and below it what was printed. A backslash goes on in the next line."""
    for command in re.split(r"^\$ ", body.replace("\\\n", ""), flags=re.M)[1:]:
        text, _, printed = command.partition("\n")
        yield text, printed.strip()


def follow(step: Step, desk: Path, environment: Path) -> bool:
    """Type one command, or run one block of Python; prints how it went."""
    told = EXITS.search(step.text)
    expected = int(told[1]) if told else 0
    began = time.monotonic()
    with spawn(step, desk, environment, subprocess.PIPE) as process:
        output, _ = process.communicate()
    good = process.returncode == expected and step.is_printed_in(output)
    # pip says so and goes on: a page would name an extra that there is not.
    good &= "does not provide the extra" not in output
    step.say("ok  " if good else "FAIL", f"{time.monotonic() - began:5.1f} s")
    if not good:
        print(f"exit {process.returncode}, expected {expected}; to be printed:\n{step.printed}", flush=True)
        print(f"printed:\n{output}", flush=True)
    return good


def start(step: Step, output: Path, desk: Path, environment: Path) -> Background:
    with output.open("w") as file:
        return Background(step, spawn(step, desk, environment, file), output)


def spawn(step: Step, desk: Path, environment: Path, output: int | IO[str]) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    wheels = f"{environment.parent / 'wheel'} {clean.get('PIP_FIND_LINKS', '')}"
    return subprocess.Popen(
        ["bash", "-c", step.text]
        if step.kind == "console"
        else [environment / "bin/python", "-c", step.text],
        cwd=desk,
        env={
            **clean,
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
            "PIP_FIND_LINKS": wheels.strip(),
            "PYTHONUNBUFFERED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",  # it would call home
        },
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ready(background: Background) -> bool:
    """Wait until it has printed what the page says it prints."""
    began = time.monotonic()
    step = background.step
    while background.process.poll() is None and time.monotonic() - began < START_SECONDS:
        if step.is_printed_in(background.output.read_text()):
            break
        time.sleep(0.1)
    good = background.process.poll() is None and step.is_printed_in(background.output.read_text())
    step.say("ok  " if good else "FAIL", f"{time.monotonic() - began:5.1f} s")
    if not good:
        print(f"expected, and that it goes on:\n{step.printed}\n{background.output.read_text()}", flush=True)
    return good


def end(background: Background) -> bool:
    """Tell it to end; it must have gone on until now, and must do so in time."""
    early = background.process.poll() is not None
    background.process.send_signal(signal.SIGTERM)
    try:
        background.process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        background.process.kill()
        early = True
    if early:
        background.step.say("FAIL", "it ended before its page, or not when told")
        print(background.output.read_text(), flush=True)
    return not early


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
    # Of what is borrowed, the one command that a page types.
    script(path / "bin/ray", f"#!{path}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n")
    return path


def runner_environment(path: Path, wheel: Path, python: str = sys.executable) -> Path:
    """The wheel with what its metadata asks for, and nothing else."""
    new_environment(path, python)
    constraints = str(ROOT / "constraints.txt")
    pip("--python", str(path / "bin/python"), "install", f"{wheel}[cpu]", "-c", constraints)
    missing = subprocess.run([path / "bin/python", "-c", "import torch"], capture_output=True, check=False)
    if missing.returncode == 0:
        raise SystemExit("the environment without torch has torch")
    return path


def new_environment(path: Path, python: str = sys.executable) -> None:
    """Without a pip of its own, which takes seconds to install; pages that type `pip` get this one."""
    subprocess.run([python, "-m", "venv", "--without-pip", path], check=True)
    script(
        path / "bin/pip", f'#!/bin/sh\nexec "{sys.executable}" -m pip -q --python "{path}/bin/python" "$@"\n'
    )


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


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

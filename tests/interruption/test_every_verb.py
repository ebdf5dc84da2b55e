"""Every verb, ended at random moments: its output is whole, nothing else is left, and the next run succeeds.

Seeds are fixed. CI ends every verb once, `make attack` (INTERRUPTIONS=20) twenty times with every signal.
What each verb is measured with is one run that nothing ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
from tiny import make_tiny, tiny_picture

from ep_export.bundle import MANIFEST, Bundle
from ep_export.calibrate.record import read_calibration
from ep_export.ownership import first_foreign
from ep_export.sweep.record import read_sweep

MOMENTS = int(os.environ.get("INTERRUPTIONS", "0"))
"""A verb and signal; without it one moment a verb, of one signal after the other."""

ENDS = {
    signal.SIGINT: {130},
    signal.SIGTERM: {143, -signal.SIGTERM},  # the latter before anything is begun
    signal.SIGKILL: {-signal.SIGKILL},
}


def whole_bundle(path: Path) -> None:
    Bundle.open(path)
    foreign = Path(first_foreign(path, MANIFEST) or ".work")
    assert any(part.startswith(".") for part in foreign.parts)  # a work folder, until the next run


def whole_sweep(path: Path) -> None:
    read_sweep(path)
    assert (path / "report.html").is_file()
    assert first_foreign(path, "sweep.json") is None


def whole_repository(path: Path) -> None:
    assert first_foreign(path, "repository.json") is None


def whole_picture(path: Path) -> None:
    assert not path.exists() or path.stat().st_size


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        arguments: That replace its output, or change it in place.
        whole: What the output it names must be at any time.
        out: Its output.
        beside: What may lie there besides it.
        again: Arguments of the next run; None: the same.
    """

    arguments: Sequence[str]
    whole: Callable[[Path], object]
    out: str
    beside: tuple[str, ...] = ()
    again: Sequence[str] | None = None


KIT = "jetson-orin-agx-64gb"
MODEL = ("--model", "tiny", "--keep", "0.5")
ASKED = ("--images", "pictures")
VERBS = {
    "calibrate": Verb(
        ("calibrate", *MODEL, "--images", "pictures", "--out", "record.json", "--overwrite"),
        read_calibration,
        "record.json",
        ("record.png",),
    ),
    "sweep": Verb(
        (
            "sweep",
            *MODEL,
            *ASKED,
            "--methods",
            "random",
            "--timed-prompts",
            "1",
            "--out",
            "sweep",
            "--overwrite",
        ),
        whole_sweep,
        "sweep",
    ),
    "build": Verb(
        ("build", *MODEL, "--layer", "1", "--images", "pictures", "--out", "built", "--overwrite"),
        whole_bundle,
        "built",
    ),
    "export": Verb(
        ("export", *MODEL, "--layer", "1", "--out", "exported", "--overwrite"), whole_bundle, "exported"
    ),
    "validate": Verb(("validate", "bundle", "--images", "pictures"), whole_bundle, "bundle"),
    "policy add": Verb(
        ("policy", "add", "bundle", "--policy", "divprune"),
        whole_bundle,
        "bundle",
        again=("policy", "add", "bundle", "--policy", "random"),
    ),
    "package": Verb(
        ("package", "bundle", "--triton", "repository", "--overwrite"), whole_repository, "repository"
    ),
    "run": Verb(
        ("run", "bundle", "--image", "pictures/0.png", "--prompt", "What", "--show", "kept.png"),
        whole_picture,
        "kept.png",
    ),
    "inspect": Verb(("inspect", "bundle"), whole_bundle, "bundle"),
    "plan": Verb(("plan", *MODEL, "--layer", "1"), whole_bundle, "bundle"),
    "compile": Verb(
        ("compile", "device", "--target", KIT, "--no-golden", "--overwrite"), whole_bundle, "device"
    ),
    "bench": Verb(
        ("bench", "bundle", "--image", "pictures/0.png", "--rounds", "3", "--max-new-tokens", "2"),
        whole_bundle,
        "bundle",
    ),
}
if MOMENTS:  # two processes that load torch: too slow for CI
    VERBS["calibrate --jobs"] = replace(
        VERBS["calibrate"], arguments=(*VERBS["calibrate"].arguments, "--jobs", "2")
    )


@dataclass
class Runs:
    """Runs of the command line in a folder, each in a fork of one process."""

    folder: Path
    zygote: subprocess.Popen[str]

    def start(self, arguments: Sequence[str]) -> int:
        """Start one; its process."""
        run = {"argv": arguments, "cwd": str(self.folder), **self._printed()}
        print(json.dumps(run), file=self.zygote.stdin, flush=True)
        return int(self.zygote.stdout.readline())

    def end(self) -> int:
        """Wait for it; its exit code, or minus the signal."""
        return int(self.zygote.stdout.readline())

    def ended_after(self, seconds: float, arguments: Sequence[str], number: signal.Signals) -> int:
        """Start one and send it a signal some time later."""
        process = self.start(arguments)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        return self.end()

    def timed(self, arguments: Sequence[str]) -> float:
        """Seconds of one that nothing ends, and that must succeed."""
        started = time.monotonic()
        self.start(arguments)
        assert self.end() == 0, self.errors
        return time.monotonic() - started

    @property
    def errors(self) -> str:
        return (self.folder.parent / "err").read_text()

    def _printed(self) -> dict[str, str]:
        return {name: str(self.folder.parent / name) for name in ("out", "err")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A folder with a checkpoint, pictures and a bundle."""
    folder = tmp_path_factory.mktemp("interruption") / "here"
    folder.mkdir()
    make_tiny(folder / "tiny", layers=3, vision_depth=1, vision_full_blocks=(0,))
    (folder / "pictures").mkdir()
    for number in range(3):
        tiny_picture(112, 84, seed=number).save(folder / "pictures" / f"{number}.png")
    zygote = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zygote.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with zygote:
        assert zygote.stdout.readline() == "ready\n"
        started = Runs(folder, zygote)
        started.timed(("export", *MODEL, "--layer", "1", "--out", "bundle"))
        started.timed(
            (
                "export",
                *MODEL,
                "--layer",
                "1",
                "--dialect",
                "portable",
                "--precision",
                "fp16",
                "--out",
                "device",
            )
        )
        yield started
        zygote.stdin.close()


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def rounds(name: str) -> list[tuple[signal.Signals, float]]:
    """Signals and moments, as shares of the verb's time."""
    rng = Random(name)  # noqa: S311 - not a secret
    if MOMENTS:
        return [(number, rng.random()) for number in ENDS for _ in range(MOMENTS)]
    return [(list(ENDS)[list(VERBS).index(name) % len(ENDS)], rng.random())]


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_that_is_ended_leaves_its_output_whole_and_the_next_run_succeeds(
    name: str, runs: Runs
) -> None:
    verb, folder = VERBS[name], runs.folder
    bundle = folder / "bundle"
    shutil.copytree(bundle, runs.folder.parent / "kept", dirs_exist_ok=True)
    seconds = runs.timed(verb.arguments)
    outputs = names(folder) | {verb.out, *verb.beside}
    for number, share in rounds(name):
        if name == "policy add":
            shutil.rmtree(bundle)
            shutil.copytree(runs.folder.parent / "kept", bundle)
        what = f"{number.name} after {share:.3f} of {name}"
        code = runs.ended_after(share * seconds, verb.arguments, number)
        assert code in {0, *ENDS[number]}, f"{what}: {code}: {runs.errors}"
        assert "Traceback" not in runs.errors, what
        verb.whole(folder / verb.out)
        left = names(folder) - outputs
        if number is signal.SIGKILL:
            assert all(file.startswith(".") for file in left), what
        else:
            assert left <= {f".{verb.out}.work"}, what  # what the same command goes on with
            assert not left or "goes on" in runs.errors, what
        if code != 0:
            runs.timed(verb.again or verb.arguments)
            verb.whole(folder / verb.out)
        assert names(folder) <= outputs, what
        if verb.whole is whole_bundle:
            assert first_foreign(folder / verb.out, MANIFEST) is None, what
    shutil.rmtree(bundle)
    (runs.folder.parent / "kept").rename(bundle)


def test_an_interrupted_calibration_goes_on_with_what_it_measured(runs: Runs) -> None:
    arguments = ("calibrate", *MODEL, "--images", "pictures", "--out", "resumed.json")
    process = runs.start(arguments)
    journals = runs.folder / ".resumed.json.work"
    while not any(file.read_text() for file in journals.glob("*.jsonl")):
        time.sleep(0.01)
    os.kill(process, signal.SIGTERM)
    assert runs.end() == 143
    assert "the same command goes on with what was measured" in runs.errors
    runs.timed(arguments)
    assert read_calibration(runs.folder / "resumed.json").images == 3
    assert not journals.exists()

"""Running the worker for one component, and making one sentence of what a compiler says when it fails."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from ep_export.documents import decode, encode
from ep_export.engine.worker import Job, Outcome
from ep_export.errors import UserError
from ep_export.targets import Flavour, Target

__all__ = ["MODULES", "compile_component", "installed_version", "require_compiler"]

MODULES = {Flavour.TENSORRT: "tensorrt", Flavour.TENSORRT_RTX: "tensorrt_rtx"}
_INSTALL = {
    Flavour.TENSORRT: "on a Jetson it comes with JetPack; elsewhere `pip install tensorrt`",
    Flavour.TENSORRT_RTX: "pip install 'ep-export[rtx]' (x86-64 Linux or Windows)",
}
_POLYGRAPHY_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
_SAID = re.compile(r"^(?:\[[^\]]*\] )*\[(?:E|F|!)\] (.*)$")
_LONGEST = 200


@dataclass(frozen=True)
class _Known:
    """A message of the compilers whose reason is known."""

    part: str
    meaning: str
    hint: str


_KNOWN = (
    _Known(
        "HW-specific datatypes",
        "the graph holds a type that GPU does not compute",
        "see the dtypes of `ep-export targets`, and build the bundle with one of them",
    ),
    _Known(
        "Attention operation was not supported by a dedicated kernel",
        "there is no Attention kernel of this type and shape",
        "build the bundle with `--dialect portable`",
    ),
    _Known(
        "FP32 GEMM is not supported",
        "that GPU multiplies no float32 matrices in TensorRT-RTX",
        "build the bundle with `--precision fp16`, and choose a policy that `ep-export targets` lists for "
        "it, or let ONNX Runtime prune on the CPU: compile --prune-on cpu",
    ),
    _Known("No space left", "the disk is full", "free some space, or give an --out on another disk"),
)


def installed_version(flavour: Flavour) -> str | None:
    """Version of TensorRT or TensorRT-RTX in this environment, without importing it; None if absent."""
    module = MODULES.get(flavour)
    if module is None or importlib.util.find_spec(module) is None:
        return None
    for distribution in packages_distributions().get(module, ()):
        try:
            return version(distribution)
        except PackageNotFoundError:  # metadata that names a package which is gone
            continue
    own = getattr(importlib.import_module(module), "__version__", None)  # installed without metadata
    return str(own) if own else None


def require_compiler(target: Target) -> str:
    """Version of the compiler a target needs.

    Raises:
        UserError: It is not installed, or in a version the target does not have, or Polygraphy is missing.
    """
    installed = installed_version(target.flavour)
    if installed is None:
        raise UserError(
            f"compiling for {target.name} needs {MODULES[target.flavour]}, which is not installed",
            hint=_INSTALL[target.flavour],
        )
    if target.versions is not None and not target.versions.holds(installed):
        raise UserError(
            f"{target.name} takes {target.flavour.value} {target.versions}, found {installed}",
            hint="install a version in that range, or copy the target's file and change its `versions`",
        )
    if importlib.util.find_spec("polygraphy") is None:
        raise UserError(
            "compiling needs the package polygraphy, which is not installed", hint="pip install polygraphy"
        )
    return installed


def compile_component(job: Job, *, component: str, target: Target) -> Outcome:
    """Compile one component in a process of its own.

    Raises:
        UserError: It failed: one sentence, from what the compiler said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "ep_export.engine.worker"],
        input=json.dumps(encode(job)),
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, _POLYGRAPHY_SWITCH: str(int(job.flavour is Flavour.TENSORRT_RTX))},
    )
    if done.returncode == 0:
        return decode(Outcome, json.loads(done.stdout.splitlines()[-1]))
    reason, hint = _reason(done.stdout + "\n" + done.stderr, done.returncode)
    raise UserError(
        f"{target.flavour.value} cannot compile {component} for {target.name}: {reason}", hint=hint
    )


def _reason(log: str, code: int) -> tuple[str, str]:
    """(reason, hint) from a compiler's log and exit code."""
    if code == -signal.SIGKILL:
        return (
            "the compiler was killed, most likely for want of memory",
            "compile on a machine with more: about 4 times the largest engine",
        )
    for known in _KNOWN:
        if known.part in log:
            return known.meaning, known.hint
    said = [match[1] for line in log.splitlines() if (match := _SAID.match(line.strip()))]
    lines = said or [line for line in log.splitlines() if line.strip()] or ["it said nothing"]
    first = lines[0] if said else lines[-1]
    if code < 0:
        first = f"it died with {signal.Signals(-code).name}; {first}"
    return first[:_LONGEST], "check the bundle with `ep-export validate`; if it passes, report this"

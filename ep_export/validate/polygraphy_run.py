"""A bundle compared component by component with Polygraphy, and the files that `polygraphy` itself reads.

`compare_with_polygraphy` writes what was found (`polygraphy.json`), and for every component `*.inputs.json`
for `polygraphy run --load-inputs`, `*.outputs.json` for `--load-outputs` and `polygraphy inspect data`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from ep_export.bundle import Bundle, Precision
from ep_export.documents import encode
from ep_export.errors import UserError
from ep_export.families import family_named
from ep_export.families.base import Video
from ep_export.progress import Progress, silent
from ep_export.reference import load_model
from ep_export.runtime.base import RunnerFactory
from ep_export.staging import refuse_existing, staged
from ep_export.validate.comparison import Finding, fold
from ep_export.validate.polygraphy_bisect import Bisection, bisect
from ep_export.validate.polygraphy_compare import ORACLE, Oracles, compare_component
from ep_export.validate.polygraphy_feeds import ComponentFeeds, component_feeds
from ep_export.validate.polygraphy_oracle import Components
from ep_export.validate.polygraphy_runners import quiet
from ep_export.validate.report import Report, Verdict, text_lines, to_json
from ep_export.validate.run import vision_layers

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import PromptInputs

__all__ = ["REPORT", "PolygraphyReport", "compare_with_polygraphy", "polygraphy_json", "polygraphy_lines"]

REPORT = "polygraphy.json"
_VIDEO = "video_encoder"
_FRAMES = 8  # as Video-LLaVA was trained on
_DTYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


@dataclass(frozen=True)
class PolygraphyReport:
    """What was found.

    Attributes:
        report: One stage an output of a component in a backend.
        runs: How often every component was run.
        bisections: For every component that failed, where it leaves the oracle; None when not asked for.
    """

    report: Report
    runs: Mapping[str, int]
    bisections: tuple[Bisection, ...] | None

    @property
    def sentence(self) -> str:
        """For the bundle's manifest and the last line of a log."""
        bad = [stage.name for stage in self.report.stages if stage.verdict is not Verdict.PASS]
        where = f" at {'; '.join(bad)}" if bad else ""
        runs = sum(self.runs.values())
        return f"{self.report.verdict.value}{where}: {len(self.runs)} components, {runs} runs against PyTorch"


def compare_with_polygraphy(
    bundle: Bundle,
    checkpoint: Checkpoint,
    backends: Mapping[str, RunnerFactory],
    *,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    out: Path,
    find_first: bool = False,
    progress: Progress = silent,
) -> PolygraphyReport:
    """Run every component on the same inputs in PyTorch and in the backends, and compare.

    Every picture is asked about once, and one prompt has none; a family with an encoder for videos gets one.
    Head and tail see the prefill and the first decode step. Inputs are what the oracle computed at each
    component's door, so that every component is judged alone.

    Args:
        bundle: The bundle.
        checkpoint: What it was built from.
        backends: Name -> opens a component's file there.
        pictures: At least one.
        prompts: At least one question.
        out: Directory to write; an earlier one of the same kind is replaced.
        find_first: For a component that failed, find the first tensor that differs (in ONNX Runtime).
        progress: Told about every component.

    Raises:
        UserError: Another checkpoint, nothing to ask, a backend cannot open a component, or `out` is somebody
            else's.
    """
    manifest = bundle.manifest
    if manifest.model_sha256 != checkpoint.fingerprint:
        raise UserError(
            f"bundle {bundle.path} was built from another checkpoint than {checkpoint.source}",
            hint=f"give the checkpoint it names: {manifest.model}",
        )
    if not pictures or not prompts:
        raise UserError(
            f"validation got {len(pictures)} pictures and {len(prompts)} prompts, expected some of each",
            hint="give a picture and a question",
        )
    refuse_existing(out, overwrite=True, marker=REPORT)
    oracles = _oracles(bundle, checkpoint)
    asked = _prompts(bundle, checkpoint, pictures, prompts)
    every = component_feeds(manifest, family_named(manifest.family), checkpoint.config, oracles.exact, asked)
    stages, bisections = [], []
    with staged(out, overwrite=True, marker=REPORT) as aside:
        for number, given in enumerate(every):
            progress("polygraphy", number, len(every))
            if not given.feeds:  # no prompt comes by: its runs are reported as 0
                continue
            file = bundle.file(given.component.file)
            openers = {name: partial(factory, file) for name, factory in backends.items()}
            findings, results = compare_component(manifest, given, oracles, openers)
            _write(aside, given, results)
            stages += [fold([finding]) for finding in findings]
            failed = _failed_case(given, findings)
            if find_first and failed is not None:
                found = bisect(bundle, given, failed, oracles)
                bisections += [found] if found is not None else []
        progress("polygraphy", len(every), len(every))
        made = PolygraphyReport(
            Report(subject=manifest.model, settings=_settings(bundle, backends), stages=tuple(stages)),
            {given.component.name: len(given.cases) for given in every},
            tuple(bisections) if find_first else None,
        )
        text = json.dumps(polygraphy_json(made), indent=2, allow_nan=False) + "\n"
        (aside / REPORT).write_text(text, encoding="utf-8")
    return made


def polygraphy_json(made: PolygraphyReport) -> dict[str, Any]:
    """Plain JSON values: `verdict`, `stages`, `runs`, `bisections`."""
    raw = to_json(made.report)
    return {
        "verdict": raw["verdict"],
        "stages": raw["stages"],
        "settings": raw["settings"],
        "runs": dict(made.runs),
        "bisections": None if made.bisections is None else [encode(found) for found in made.bisections],
    }


def polygraphy_lines(made: PolygraphyReport) -> list[str]:
    """A table for a terminal, then where the graph leaves the oracle, then one sentence."""
    *table, _ = text_lines(made.report)
    found = [line for bisection in made.bisections or () for line in _bisection_lines(bisection)]
    if made.bisections == () and made.report.verdict is Verdict.FAIL:
        found = [
            "no tensor inside ONNX Runtime's graphs leaves its tolerance: the difference is another backend's"
        ]
    elif made.bisections == ():
        found = ["nothing to bisect: no tensor leaves its tolerance"]
    return [*table, *found, made.sentence]


def _bisection_lines(found: Bisection) -> list[str]:
    lines = [found.sentence, f"  {found.origin}", "  compared in the last round, in the graph's order:"]
    for checked in found.checked:
        figures = f"{checked.max_abs_error:>9.2e}  {checked.tolerance:>9.2e}"
        lines.append(f"  {checked.verdict.value:<4}  {figures}  {checked.tensor}  {checked.meaning}")
    return lines


def _oracles(bundle: Bundle, checkpoint: Checkpoint) -> Oracles:
    policy, dtype = bundle.manifest.policy, _DTYPES.get(bundle.manifest.precision)
    half = Components(load_model(checkpoint, dtype), policy) if dtype is not None else None
    return Oracles(Components(load_model(checkpoint), policy), half, vision_layers(checkpoint.config))


def _prompts(
    bundle: Bundle, checkpoint: Checkpoint, pictures: Sequence[Image.Image], prompts: Sequence[str]
) -> dict[str, PromptInputs]:
    family = family_named(bundle.manifest.family)
    builder = family.prompt_builder(bundle.file("processor"), checkpoint.config)
    asked = {
        f"question {i + 1}": builder.build([picture], prompts[i % len(prompts)])
        for i, picture in enumerate(pictures)
    }
    if any(component.name == _VIDEO for component in bundle.manifest.components):
        asked["a video"] = builder.build([_video(pictures[0])], prompts[0])
    return {**asked, "no picture": builder.build([], prompts[0])}


def _video(picture: Image.Image) -> Video:
    """The picture moving: what a tower of its own for videos is compared on."""
    from PIL import ImageChops

    step = max(1, picture.width // _FRAMES)
    return Video(tuple(ImageChops.offset(picture, i * step, 0) for i in range(_FRAMES)), fps=1.0)


def _failed_case(given: ComponentFeeds, findings: Sequence[Finding]) -> int | None:
    """The first run of a component in which an output failed."""
    failed = {
        case
        for finding in findings
        for comparison in finding.comparisons
        if comparison.verdict is Verdict.FAIL
        for case, name in enumerate(given.cases)
        if comparison.where.startswith(f"{name}, ")
    }
    return min(failed, default=None)


def _write(directory: Path, given: ComponentFeeds, results: RunResults) -> None:
    name = given.component.name
    with quiet():
        save_json(list(given.feeds), str(directory / f"{name}.inputs.json"), description=None)
        results.save(str(directory / f"{name}.outputs.json"))


def _settings(bundle: Bundle, backends: Mapping[str, RunnerFactory]) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "precision": manifest.precision.value,
        "dialect": f"{manifest.dialect.value}, opset {manifest.opset}",
        "runners": ", ".join([ORACLE, *backends]),
        "oracle": "Hugging Face's modules, float32, exact float64 scores",
    }

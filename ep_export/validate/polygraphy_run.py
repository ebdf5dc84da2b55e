"""A bundle compared component by component with Polygraphy, and the files that `polygraphy` itself reads.

`compare_with_polygraphy` writes its findings (`polygraphy.json`), and for every component `*.inputs.json`
for `polygraphy run --load-inputs`, `*.outputs.json` for `--load-outputs` and `polygraphy inspect data`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from ep_export.bundle import Bundle
from ep_export.checkpoint import check_origin
from ep_export.documents import encode
from ep_export.families import family_named
from ep_export.policy import Schedule
from ep_export.progress import Progress, silent
from ep_export.reference import load_model
from ep_export.runtime.base import RunnerFactory
from ep_export.runtime.components import open_component
from ep_export.staging import refuse_existing, staged
from ep_export.validate.comparison import Finding, fold
from ep_export.validate.component_feeds import ComponentFeeds, component_feeds
from ep_export.validate.component_oracle import ComponentOracle
from ep_export.validate.polygraphy_bisect import Bisection, bisect
from ep_export.validate.polygraphy_compare import ORACLE, Oracles, compare_component, quiet
from ep_export.validate.questions import check_asked, questions
from ep_export.validate.report import Report, Verdict, text_lines, to_json
from ep_export.validate.setting import HALF_TYPES, vision_layers
from ep_export.weights.store import bundle_layers

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.checkpoint import Checkpoint

__all__ = ["REPORT", "PolygraphyReport", "compare_with_polygraphy", "polygraphy_json", "polygraphy_lines"]

REPORT = "polygraphy.json"


@dataclass(frozen=True)
class PolygraphyReport:
    """What was found.

    Attributes:
        report: One stage an output of a component in a backend.
        runs: How often every component was run.
        bisections: For every component that failed, where it leaves the oracle; None unless wanted.
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
    policies: Sequence[str] = (),
    find_first: bool = False,
    progress: Progress = silent,
) -> PolygraphyReport:
    """Run every component on the same inputs in PyTorch and in the backends, and compare.

    See `questions` for what is asked. Spans see the prefill and the first decode step. Inputs are what the
    oracle computed before each component, so that every component is judged alone.

    Args:
        bundle: The bundle.
        checkpoint: What it was built from.
        backends: Name -> opens a component's file there.
        pictures: At least one.
        prompts: At least one question.
        out: Directory to write; an earlier one of the same kind is replaced.
        policies: Which of the bundle's policies; see `Manifest.scheduled`.
        find_first: For a component that failed, find the first tensor that differs (in ONNX Runtime).
        progress: Told about every component.

    Raises:
        UserError: Another checkpoint, nothing to ask, no such policy, a backend cannot open a component, or
            `out` is somebody else's.
    """
    check_origin(bundle, checkpoint)
    check_asked(pictures, prompts)
    refuse_existing(out, overwrite=True, marker=REPORT)
    schedule = bundle.manifest.scheduled(policies)
    oracles = _oracles(bundle, checkpoint)
    every = _feeds(bundle, checkpoint, schedule, oracles.exact, pictures, prompts)
    stages, bisections = [], []
    with staged(out, overwrite=True, marker=REPORT) as aside:
        for number, given in enumerate(every):
            progress("polygraphy", number, len(every))
            if not given.feeds:  # no prompt comes by: its runs are reported as 0
                continue
            openers = {
                name: partial(open_component, bundle, given.component, factory)
                for name, factory in backends.items()
            }
            findings, results = compare_component(bundle.manifest, given, oracles, openers)
            _write(aside, given, results)
            stages += [fold([finding]) for finding in findings]
            failed = _failed_case(given, findings)
            if find_first and failed is not None:
                bisection = bisect(bundle, given, failed, oracles)
                bisections += [bisection] if bisection is not None else []
        progress("polygraphy", len(every), len(every))
        settings = _settings(bundle, schedule, backends)
        result = PolygraphyReport(
            Report(subject=bundle.manifest.model_name, settings=settings, stages=tuple(stages)),
            {given.component.name: len(given.cases) for given in every},
            tuple(bisections) if find_first else None,
        )
        text = json.dumps(polygraphy_json(result), indent=2, allow_nan=False) + "\n"
        (aside / REPORT).write_text(text, encoding="utf-8")
    return result


def polygraphy_json(result: PolygraphyReport) -> dict[str, Any]:
    """Plain JSON values: `verdict`, `stages`, `runs`, `bisections`."""
    raw = to_json(result.report)
    return {
        "verdict": raw["verdict"],
        "stages": raw["stages"],
        "settings": raw["settings"],
        "runs": dict(result.runs),
        "bisections": None if result.bisections is None else [encode(each) for each in result.bisections],
    }


def polygraphy_lines(result: PolygraphyReport) -> list[str]:
    """A table for a terminal, then where the graph leaves the oracle, then one sentence."""
    *table, _ = text_lines(result.report)
    lines = [line for bisection in result.bisections or () for line in _bisection_lines(bisection)]
    if result.bisections == () and result.report.verdict is Verdict.FAIL:
        lines = [
            "no tensor inside ONNX Runtime's graphs leaves its tolerance: the difference is another backend's"
        ]
    elif result.bisections == ():
        lines = ["nothing to bisect: no tensor leaves its tolerance"]
    return [*table, *lines, result.sentence]


def _bisection_lines(bisection: Bisection) -> list[str]:
    lines = [
        bisection.sentence,
        f"  {bisection.origin}",
        "  compared in the last round, in the graph's order:",
    ]
    for checked in bisection.checked:
        figures = f"{checked.max_abs_error:>9.2e}  {checked.tolerance:>9.2e}"
        lines.append(f"  {checked.verdict.value:<4}  {figures}  {checked.tensor}  {checked.meaning}")
    return lines


def _oracles(bundle: Bundle, checkpoint: Checkpoint) -> Oracles:
    dtype = HALF_TYPES.get(bundle.manifest.precision)
    quantised = bundle_layers(bundle)
    half = ComponentOracle(load_model(checkpoint, dtype, quantised=quantised)) if dtype else None
    exact = ComponentOracle(load_model(checkpoint, quantised=quantised))
    return Oracles(exact, half, vision_layers(checkpoint.config))


def _feeds(
    bundle: Bundle,
    checkpoint: Checkpoint,
    schedule: Schedule,
    oracle: ComponentOracle,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
) -> tuple[ComponentFeeds, ...]:
    manifest = bundle.manifest
    family = family_named(manifest.family)
    builder = family.prompt_builder(bundle.file("processor"), checkpoint.config)
    every, _ = questions(manifest, builder, len(pictures), prompts)
    return component_feeds(
        manifest,
        schedule,
        manifest.keep_for(schedule),
        family=family,
        config=checkpoint.config,
        oracle=oracle,
        prompts={question.name: question.build(builder, pictures) for question in every},
    )


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


def _settings(bundle: Bundle, schedule: Schedule, backends: Mapping[str, RunnerFactory]) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "policies": str(schedule),
        "precision": manifest.precision.value,
        "dialect": f"{manifest.dialect.value}, opset {manifest.opset}",
        "runners": ", ".join([ORACLE, *backends]),
        "oracle": "Hugging Face's modules, float32, exact float64 scores",
    }

"""Golden files of a kit: inputs of every component and what PyTorch makes of them, as Polygraphy reads them.

A bundle and its checkpoint enter. For every case `golden/<component>.<profile>.` leave:

    inputs.json      `polygraphy run --load-inputs`: one set of inputs a run
    outputs.json     `polygraphy run --load-outputs`: PyTorch's float32 outputs
    tolerances       `output:largest difference`, a line each, after comments with the reasons
    choice.json      of prune components: what a device's own choice is judged with
    cases.tsv        the cases: name, component, index of the profile
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json

from ep_export.bundle import Bundle, Component, Manifest, Precision, Role
from ep_export.checkpoint import check_origin
from ep_export.choosers import choose
from ep_export.choosers.coverage import weighted_rows
from ep_export.choosers.top_k import picture_of
from ep_export.engine.checks import free_memory
from ep_export.engine.kit_files import GoldenCase
from ep_export.errors import UserError
from ep_export.families import family_named
from ep_export.policy import Budget, Coverage, TopK
from ep_export.progress import Progress
from ep_export.reference import load_model
from ep_export.runtime import OnnxRuntimeRunner
from ep_export.testcards import make_cards
from ep_export.validate.choices import graph_spread
from ep_export.validate.component_feeds import ComponentFeeds, component_feeds
from ep_export.validate.component_oracle import ComponentOracle, prune_tokens
from ep_export.validate.polygraphy_compare import quiet
from ep_export.validate.questions import make_clip
from ep_export.validate.setting import vision_layers
from ep_export.validate.tolerance import output_tolerance
from ep_export.weights.store import bundle_layers

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint
    from ep_export.engine.profiles import Profiles
    from ep_export.engine_record import Limits
    from ep_export.families.base import PromptInputs

__all__ = ["GOLDEN", "write_golden"]

GOLDEN = "golden"
_STAGE = "golden files"
_QUESTION = "What is in this picture?"
_KEPT = "kept_index"
_DTYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
_SPREAD_MARGIN = 2.0
"""ONNX Runtime's scoring errors stand for those of TensorRT or the plugin, which add in another order."""

_Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Case:
    """A case with its arrays."""

    golden: GoldenCase
    component: Component
    feeds: tuple[_Outputs, ...]
    outputs: tuple[_Outputs, ...]


def write_golden(
    bundle: Bundle,
    checkpoint: Checkpoint,
    limits: Limits,
    profiles: Profiles,
    components: Sequence[Component],
    out: Path,
    progress: Progress,
) -> tuple[GoldenCase, ...]:
    """Compute and write the golden files of a bundle.

    The model is loaded in float32, and after that once more in the graphs' type where that is another: the
    tolerance of a half type is how far PyTorch itself moves in it.

    Args:
        bundle: The bundle.
        checkpoint: What it was built from.
        limits: What the engines are compiled for.
        profiles: Their profiles; the inputs lie within them.
        components: What becomes an engine.
        out: Directory of the kit; `golden/` is made in it.
        progress: Told about the steps.

    Raises:
        UserError: Another checkpoint, limits too small for every test card, or too little memory.
    """
    manifest = bundle.manifest
    check_origin(bundle, checkpoint)
    _check_memory(checkpoint)
    prompt = _prompt(bundle, checkpoint, limits)
    steps = 3
    progress(_STAGE, 0, steps)
    quantised = bundle_layers(bundle)
    exact = ComponentOracle(load_model(checkpoint, quantised=quantised))
    given = _feeds(bundle, checkpoint, exact, prompt, components, limits)
    cases = [case for feeds in given for case in _cases(feeds, profiles, exact)]
    progress(_STAGE, 1, steps)
    del exact  # the two models need not fit into memory at once
    dtype = _DTYPES.get(manifest.precision)
    half = ComponentOracle(load_model(checkpoint, dtype, quantised=quantised)) if dtype else None
    noise = {case.golden.name: _noise(case, half) for case in cases}
    progress(_STAGE, 2, steps)
    folder, depth = out / GOLDEN, vision_layers(checkpoint.config)
    folder.mkdir()
    with quiet():
        for case in cases:
            _write(folder, case, _tolerances(manifest, case, noise[case.golden.name], depth))
            if case.component.role is Role.PRUNE:
                save_json(_choice(bundle, case), str(folder / f"{case.golden.name}.choice.json"))
    rows = (f"{case.golden.name}\t{case.golden.component}\t{case.golden.profile}\n" for case in cases)
    (folder / "cases.tsv").write_text("".join(rows), encoding="utf-8")
    progress(_STAGE, steps, steps)
    return tuple(case.golden for case in cases)


def _check_memory(checkpoint: Checkpoint) -> None:
    """Refuse before minutes are spent on a model that does not fit in float32.

    Raises:
        UserError: Its weights alone are more than the memory that is free.
    """
    needed = 4 * sum(math.prod(ref.shape) for ref in checkpoint.tensors.values())
    free = free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"golden outputs need the model in float32, {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB of memory "
            "are free here",
            hint="make the kit on a machine with more memory, or without golden files: --no-golden",
        )


def _prompt(bundle: Bundle, checkpoint: Checkpoint, limits: Limits) -> PromptInputs:
    """A question about the first test card that fits into the limits.

    Raises:
        UserError: None does.
    """
    family = family_named(bundle.manifest.family)
    prompts = family.prompt_builder(bundle.file("processor"), checkpoint.config)
    lengths = []
    for card in make_cards():
        if card.width * card.height > limits.max_pixels:
            continue
        prompt = prompts.build([card], _QUESTION)
        lengths.append(prompt.input_ids.shape[1])
        if lengths[-1] <= limits.max_prompt:
            return prompt
    raise UserError(
        f"no test card fits into --max-pixels {limits.max_pixels} and --max-prompt {limits.max_prompt}, "
        "so the kit would have nothing to verify engines with",
        hint=f"give --max-prompt {min(lengths)} or more" if lengths else "give --max-pixels 50176 or more",
    )


def _feeds(
    bundle: Bundle,
    checkpoint: Checkpoint,
    oracle: ComponentOracle,
    card: PromptInputs,
    components: Sequence[Component],
    limits: Limits,
) -> Iterator[ComponentFeeds]:
    """What every component is run on: the test card, under the bundle's schedule and under other policies.

    Towers that no card reaches, those for videos, are run on a clip.
    """
    manifest, family = bundle.manifest, family_named(bundle.manifest.family)
    wanted = {component.name for component in components}

    def under(policies: Sequence[str], name: str, prompt: PromptInputs) -> Iterator[ComponentFeeds]:
        """Of the components that are still without."""
        every = component_feeds(
            manifest,
            manifest.scheduled(policies),
            manifest.keep,
            family=family,
            config=checkpoint.config,
            oracle=oracle,
            prompts={name: prompt},
            capacity={span.name: limits.at(span, manifest.schedule).capacity for span in manifest.spans},
        )
        for feeds in every:
            if feeds.feeds and feeds.component.name in wanted:
                wanted.remove(feeds.component.name)
                yield feeds

    yield from under((), "card", card)
    for prune in components:
        if prune.role is Role.PRUNE and prune.name in wanted:
            yield from under(_policies_with(manifest, prune), "card", card)
    if wanted:
        builder = family.prompt_builder(bundle.file("processor"), checkpoint.config)
        yield from under((), "clip", builder.build([make_clip()], _QUESTION))


def _policies_with(manifest: Manifest, prune: Component) -> tuple[str, ...]:
    """The schedule's policies, at one cut that of a prune component."""
    names = [cut.chooser.name for cut in manifest.schedule.cuts]
    if prune.cut is not None and prune.chooser is not None:
        names[prune.cut] = prune.chooser.name
    return tuple(names)


def _cases(given: ComponentFeeds, profiles: Profiles, oracle: ComponentOracle) -> list[_Case]:
    """The runs of one component, those of a profile together.

    Raises:
        UserError: Inputs lie outside every profile.
    """
    component = given.component
    by_profile: dict[int, list[_Outputs]] = {}
    for feeds in given.feeds:
        shapes = {name: feed.shape for name, feed in feeds.items()}
        held = [i for i, profile in enumerate(profiles[component.name]) if profile.holds(shapes)]
        if not held:
            raise UserError(
                f"the test card's inputs of {component.name} lie outside its profiles: {shapes}",
                hint="give a larger --max-prompt, --max-pixels or --max-kept-tokens",
            )
        by_profile.setdefault(held[0], []).append(feeds)
    return [
        _Case(
            GoldenCase(f"{component.name}.{profiles[component.name][i].name}", component.name, i, len(every)),
            component,
            tuple(every),
            tuple(oracle.run(component, feeds) for feeds in every),
        )
        for i, every in sorted(by_profile.items())
    ]


def _choice(bundle: Bundle, case: _Case) -> dict[str, Any]:
    """Everything a device's own choice is judged with; see engines/kit/check_choice.py."""
    manifest, chooser, feeds = bundle.manifest, case.component.chooser, case.feeds[0]
    assert chooser is not None  # noqa: S101 - it is a prune component's
    tokens = prune_tokens(case.component, manifest.dims, feeds)
    choice = choose(chooser, tokens, len(feeds.get("keep_slots", ())))
    with OnnxRuntimeRunner(bundle.file(case.component.file)) as runner:
        outputs = {name: value.numpy() for name, value in runner.run(feeds).items()}
    spread = graph_spread(chooser, tokens, outputs.get("scores"), manifest.degree)
    judged = {
        "kind": chooser.kind.value,
        "kept": choice.kept.numpy(),
        "tolerance": _SPREAD_MARGIN * spread,
    }
    if isinstance(chooser, TopK) and choice.scores is not None:
        index = feeds["visual_index"]
        per_picture = chooser.budget is Budget.PER_PICTURE
        judged["scores"] = choice.scores.numpy()
        judged["select"] = chooser.select.value
        judged["pictures"] = picture_of(index) if per_picture else np.zeros_like(index)
    if isinstance(chooser, Coverage):
        rows, first = weighted_rows(chooser, tokens)
        judged["weights"] = torch.where(rows.finite, first, 0.0).numpy()
    return judged


def _noise(case: _Case, half: ComponentOracle | None) -> dict[str, float]:
    """How far PyTorch in the graphs' half type is from PyTorch in float32, by output."""
    noise: dict[str, float] = {}
    if half is None:
        return noise
    for feeds, exact in zip(case.feeds, case.outputs, strict=True):
        # the half run must not choose by itself: its own near-ties are nobody's
        outputs = half.run(case.component, feeds, kept=exact.get(_KEPT))
        for name, wanted in exact.items():
            moved = float(np.abs(outputs[name].astype(np.float64) - wanted).max(initial=0.0))
            noise[name] = max(noise.get(name, 0.0), moved)
    return noise


def _tolerances(
    manifest: Manifest, case: _Case, noise: Mapping[str, float], depth: int
) -> dict[str, tuple[float, str]]:
    """For every output the largest difference allowed, and why."""
    prunes = case.component.role is Role.PRUNE
    tokens = prune_tokens(case.component, manifest.dims, case.feeds[0]) if prunes else None
    allowed = {}
    for spec in case.component.outputs:
        tolerance = output_tolerance(
            manifest,
            case.component,
            spec,
            vision_layers=depth,
            noise=noise.get(spec.name, 0.0),
            tokens=tokens,
        )
        scale = max(float(np.abs(outputs[spec.name]).max(initial=0.0)) for outputs in case.outputs)
        allowed[spec.name] = tolerance.allowed(scale), tolerance.reason
    return allowed


def _write(folder: Path, case: _Case, tolerances: Mapping[str, tuple[float, str]]) -> None:
    name = case.golden.name
    save_json(list(case.feeds), str(folder / f"{name}.inputs.json"))
    runs = [IterationResult(outputs=outputs, runner_name="pytorch") for outputs in case.outputs]
    RunResults([("pytorch", runs)]).save(str(folder / f"{name}.outputs.json"))
    lines = [f"# {reason}" for reason in dict.fromkeys(reason for _, reason in tolerances.values())]
    lines += [f"{output}:{allowed:.3e}" for output, (allowed, _) in tolerances.items()]
    (folder / f"{name}.tolerances").write_text("\n".join(lines) + "\n", encoding="utf-8")

"""Golden files of a kit: inputs of every component and what PyTorch makes of them, as Polygraphy reads them.

A bundle and its checkpoint enter. For every case `golden/<component>.<profile>.` leave:

    inputs.json      `polygraphy run --load-inputs`: one set of inputs a run
    outputs.json     `polygraphy run --load-outputs`: PyTorch's float32 outputs
    tolerances       `output:largest difference`, a line each, after comments with the reasons
    choice.json      where tokens are chosen: exact scores and what every position's outputs would be
    cases.tsv        the cases: name, component, index of the profile
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json

from ep_export.bundle import Bundle, Component, Manifest, Precision
from ep_export.engine.checks import free_memory
from ep_export.engine.kit_files import GoldenCase
from ep_export.entropy import token_scores
from ep_export.entropy.selection import picture_of
from ep_export.errors import UserError
from ep_export.families import family_named
from ep_export.families.base import Video
from ep_export.policy import Budget
from ep_export.progress import Progress
from ep_export.reference import load_model
from ep_export.testcards import make_cards
from ep_export.validate.choices import choice_tolerance
from ep_export.validate.polygraphy_compare import layers_before, tolerance_of
from ep_export.validate.polygraphy_feeds import ComponentFeeds, component_feeds
from ep_export.validate.polygraphy_oracle import Components
from ep_export.validate.polygraphy_runners import quiet
from ep_export.validate.run import vision_layers
from ep_export.validate.tolerance import EXACT, Tolerance

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint
    from ep_export.engine.profiles import Profiles
    from ep_export.engine_record import Limits
    from ep_export.families.base import PromptInputs

__all__ = ["GOLDEN", "write_golden"]

GOLDEN = "golden"
_STAGE = "golden files"
_QUESTION = "What is in this picture?"
_VIDEO = "video_encoder"
_KEPT = "kept_index"
_DTYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
_INTEGERS = "integers: equal or not"

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
        out: Directory of the kit; `golden/` is made in it.
        progress: Told about the steps.

    Raises:
        UserError: Another checkpoint, limits too small for every test card, or too little memory.
    """
    manifest = bundle.manifest
    if manifest.model_sha256 != checkpoint.fingerprint:
        raise UserError(
            f"bundle {bundle.path} was built from another checkpoint than {checkpoint.source}",
            hint=f"give the checkpoint it names: {manifest.model}",
        )
    _check_memory(checkpoint)
    prompt = _prompt(bundle, checkpoint, limits)
    steps = 3
    progress(_STAGE, 0, steps)
    exact = Components(load_model(checkpoint), manifest.policy)
    family = family_named(manifest.family)
    given = component_feeds(manifest, family, checkpoint.config, exact, {"card": prompt})
    if any(component.name == _VIDEO for component in manifest.components):
        clip = component_feeds(
            manifest, family, checkpoint.config, exact, {"clip": _clip(bundle, checkpoint)}
        )
        # of the clip only what the tower of its own sees: the others have their card
        given = (*given, *(feeds for feeds in clip if feeds.component.name == _VIDEO))
    cases = [case for feeds in given for case in _cases(feeds, profiles, exact)]
    head = next(case for case in cases if case.golden.name == "decoder_head.prefill")
    choice = _choice(manifest, exact, head)
    progress(_STAGE, 1, steps)
    del exact  # the two models need not fit into memory at once
    half = _half(checkpoint, manifest)
    noise = {case.golden.name: _noise(case, half) for case in cases}
    depth = vision_layers(checkpoint.config)
    choice["tolerance"] = choice_tolerance(
        manifest,
        choice.pop("states"),
        layers=depth + manifest.policy.layer,
        half_states=half.choice(head.feeds[0]).states.numpy() if half is not None else None,
    )
    progress(_STAGE, 2, steps)
    folder = out / GOLDEN
    folder.mkdir()
    with quiet():
        for case in cases:
            _write(folder, case, _tolerances(manifest, case, noise[case.golden.name], depth))
        save_json(choice, str(folder / f"{head.golden.name}.choice.json"))
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


def _clip(bundle: Bundle, checkpoint: Checkpoint) -> PromptInputs:
    """A question about a video of two frames, for families with a tower of its own for them."""
    first, second = make_cards(((224, 224),) * 2)
    prompts = family_named(bundle.manifest.family).prompt_builder(bundle.file("processor"), checkpoint.config)
    return prompts.build([Video((first, second), fps=1.0)], _QUESTION)


def _cases(given: ComponentFeeds, profiles: Profiles, oracle: Components) -> list[_Case]:
    """The runs of one component, those of a profile together; none where the card has nothing for it.

    Raises:
        UserError: Inputs lie outside every profile.
    """
    component = given.component
    found: dict[int, list[_Outputs]] = {}
    for feeds in given.feeds:
        shapes = {name: feed.shape for name, feed in feeds.items()}
        held = [i for i, profile in enumerate(profiles[component.name]) if profile.holds(shapes)]
        if not held:
            raise UserError(
                f"the test card's inputs of {component.name} lie outside its profiles: {shapes}",
                hint="give a larger --max-prompt, --max-pixels or --max-kept-tokens",
            )
        found.setdefault(held[0], []).append(feeds)
    return [
        _Case(
            GoldenCase(f"{component.name}.{profiles[component.name][i].name}", component.name, i, len(every)),
            component,
            tuple(every),
            tuple(oracle.run(component.name, feeds) for feeds in every),
        )
        for i, every in sorted(found.items())
    ]


def _choice(manifest: Manifest, oracle: Components, head: _Case) -> dict[str, Any]:
    """Everything a device's own choice is judged with; see engines/kit/check_choice.py."""
    feeds, policy = head.feeds[0], manifest.policy
    own, index = oracle.choice(feeds), feeds["visual_index"]
    everything = np.arange(feeds["inputs_embeds"].shape[1])
    every = oracle.run(head.component.name, feeds, kept=everything)
    per_picture = policy.budget is Budget.PER_PICTURE
    return {
        "scores": token_scores(own.states, policy.scorer).numpy(),
        "states": own.states.numpy(),
        "kept": own.kept,
        "visual_index": index,
        "pictures": picture_of(index) if per_picture else np.zeros_like(index),
        "select": policy.select.value,
        "hidden_states": every["hidden_states"],
        "position_ids": every["kept_position_ids"],
    }


def _half(checkpoint: Checkpoint, manifest: Manifest) -> Components | None:
    dtype = _DTYPES.get(manifest.precision)
    return Components(load_model(checkpoint, dtype), manifest.policy) if dtype is not None else None


def _noise(case: _Case, half: Components | None) -> dict[str, float]:
    """How far PyTorch in the graphs' half type is from PyTorch in float32, by output."""
    noise: dict[str, float] = {}
    if half is None:
        return noise
    for feeds, exact in zip(case.feeds, case.outputs, strict=True):
        # the half run must not choose by itself: its own near-ties are nobody's
        made = half.run(case.component.name, feeds, kept=exact.get(_KEPT))
        for name, wanted in exact.items():
            moved = float(np.abs(made[name].astype(np.float64) - wanted).max(initial=0.0))
            noise[name] = max(noise.get(name, 0.0), moved)
    return noise


def _tolerances(
    manifest: Manifest, case: _Case, noise: Mapping[str, float], depth: int
) -> dict[str, tuple[float, str]]:
    """For every output the largest difference allowed, and why."""
    made = {}
    for spec in case.component.outputs:
        if spec.dtype == "int64":
            tolerance = Tolerance(0.0, 0.0, _INTEGERS)
        elif case.component.name == "embed_tokens" and manifest.precision is Precision.FP32:
            tolerance = EXACT
        else:
            layers = layers_before(manifest, case.component.name, spec.name, depth)
            tolerance = tolerance_of(manifest, layers, noise.get(spec.name, 0.0))
        scale = max(float(np.abs(outputs[spec.name]).max(initial=0.0)) for outputs in case.outputs)
        made[spec.name] = tolerance.allowed(scale), tolerance.reason
    return made


def _write(folder: Path, case: _Case, tolerances: Mapping[str, tuple[float, str]]) -> None:
    name = case.golden.name
    save_json(list(case.feeds), str(folder / f"{name}.inputs.json"))
    runs = [IterationResult(outputs=outputs, runner_name="pytorch") for outputs in case.outputs]
    RunResults([("pytorch", runs)]).save(str(folder / f"{name}.outputs.json"))
    lines = [f"# {reason}" for reason in _distinct(reason for _, reason in tolerances.values())]
    lines += [f"{output}:{allowed:.3e}" for output, (allowed, _) in tolerances.items()]
    (folder / f"{name}.tolerances").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _distinct(reasons: Any) -> Sequence[str]:
    return list(dict.fromkeys(reasons))

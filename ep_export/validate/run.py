"""Validate a bundle against Hugging Face: run both on the same prompts, compare stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ep_export.bundle import Bundle
from ep_export.checkpoint import check_origin
from ep_export.choosers import choose
from ep_export.first_token import prompt_plan
from ep_export.numerics import Numerics, RoundingCost
from ep_export.policy import Schedule
from ep_export.progress import Progress, silent
from ep_export.reference import PruneSpec, load_model
from ep_export.runtime import Session
from ep_export.runtime.kept import kept_pictures
from ep_export.validate.comparison import Finding
from ep_export.validate.observe import Observation, Oracle, observe
from ep_export.validate.preprocessing import compare_preprocessing, own_processor
from ep_export.validate.questions import check_asked, questions
from ep_export.validate.report import Case, Report
from ep_export.validate.rounding import rounding_costs
from ep_export.validate.setting import HALF_TYPES, Setting, vision_layers
from ep_export.validate.stages import find, fold_stages
from ep_export.weights.store import bundle_layers

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import PromptInputs
    from ep_export.policy import Keep

__all__ = ["validate"]

_OWN_PROCESSOR = "compared with transformers' own processor; a video's is left out"


def validate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    *,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    policies: Sequence[str] = (),
    max_new_tokens: int = 16,
    progress: Progress = silent,
) -> Report:
    """Compare a bundle, run by ONNX Runtime, with the pruned Hugging Face model it was made from.

    See `questions` for what is asked. The oracle is float32 with exact float64 scores. Hidden states, logits,
    caches and answers are compared given the bundle's kept set at every cut, so that a near-tie among tokens
    is not taken for an error in arithmetic.

    Args:
        bundle: The bundle.
        checkpoint: What it was built from.
        pictures: At least one.
        prompts: At least one question.
        policies: Which of the bundle's policies; see `Manifest.scheduled`.
        max_new_tokens: Longest greedy answer compared.
        progress: Told about every prompt.

    Raises:
        UserError: Nothing to ask, another checkpoint, no such policy, or a bundle ONNX Runtime cannot run.
    """
    check_asked(pictures, prompts)
    check_origin(bundle, checkpoint)
    manifest = bundle.manifest
    schedule = manifest.scheduled(policies)
    setting = Setting(manifest, schedule, vision_layers(checkpoint.config))
    findings: list[tuple[Finding, ...]] = []
    cases: list[Case] = []
    prompted: list[PromptInputs] = []
    quantised = bundle_layers(bundle)
    processor, no_processor = own_processor(checkpoint)
    with Session.open(bundle, exact=True) as session:
        every, no_video = questions(manifest, session.prompts, len(pictures), prompts)
        half_type = HALF_TYPES.get(manifest.precision)
        half = load_model(checkpoint, half_type, quantised=quantised) if half_type is not None else None
        oracle = Oracle(load_model(checkpoint, quantised=quantised), half)
        progress("validate", 0, len(every))
        keep = manifest.keep
        for question in every:
            observation = observe(
                session, oracle, question, pictures, policies=policies, max_new_tokens=max_new_tokens
            )
            keep = observation.generation.keep
            found = find(setting, observation)
            if processor is not None:
                shown = [] if question.clip else [pictures[number] for number in question.pictures]
                own = processor(shown, question.prompt) if shown else None
                found = (compare_preprocessing(question.name, observation.prompt, own, checkpoint), *found)
            findings.append(found)
            cases.append(_case(checkpoint, observation, schedule))
            prompted.append(observation.prompt)
            progress("validate", len(cases), len(every))
    return Report(
        subject=manifest.model_name,
        settings={
            **_settings(bundle, schedule, keep, no_video),
            "preprocessing": f"not compared: {no_processor}" if no_processor else _OWN_PROCESSOR,
        },
        stages=fold_stages(findings),
        cases=tuple(cases),
        policies=tuple(cut.chooser.name for cut in schedule.cuts),
        rounding=_rounding(checkpoint, oracle, prompted, PruneSpec(schedule, keep), max_new_tokens)
        if quantised and checkpoint.published is None  # else nothing is there to compare with
        else (),
    )


def _rounding(
    checkpoint: Checkpoint,
    oracle: Oracle,
    prompts: Sequence[PromptInputs],
    spec: PruneSpec,
    max_new_tokens: int,
) -> tuple[RoundingCost, ...]:
    return rounding_costs(load_model(checkpoint), oracle.exact, checkpoint, prompts, spec, max_new_tokens)


def _settings(bundle: Bundle, schedule: Schedule, keep: Keep, no_video: str) -> dict[str, str]:
    manifest = bundle.manifest
    evidence = manifest.evidence.summary
    if schedule != manifest.schedule:
        evidence = f"none for these policies; the bundle's own ({manifest.schedule}) stand on: {evidence}"
    return {
        "keep": f"{keep} on average over {manifest.dims.layers} layers",
        "layers": ", ".join(_layers(span.layer_range) for span in manifest.spans),
        "policies": str(schedule),
        "evidence": evidence,
        "precision": manifest.precision.value,
        **_weights(manifest.numerics),
        "dialect": f"{manifest.dialect.value}, opset {manifest.opset}",
        "scores": f"entropy series of degree {manifest.degree}",
        "kept sets": "hidden states, logits, caches and answers are compared given the bundle's own",
        "video": no_video or "a clip of test cards",
        "bundle run by": "ONNX Runtime, CPU",
        "oracle": "Hugging Face transformers, pruned alike: float32, exact float64 scores",
    }


def _weights(numerics: Numerics | None) -> dict[str, str]:
    stored = numerics.weights if numerics else None
    if stored is None:
        return {}
    group = f", groups of {stored.group}" if stored.group else ""
    return {"weights": f"{stored.kind.value}{group}, {stored.rounding}; the oracle has them dequantised"}


def _layers(layers: range) -> str:
    """For people."""
    return f"{layers.start} to {layers.stop - 1}" if len(layers) > 1 else str(layers.start)


def _case(checkpoint: Checkpoint, seen: Observation, schedule: Schedule) -> Case:
    cuts = [cut.kept_index for cut in seen.got.cuts]
    visual = seen.prompt.visual_index
    kept = tuple(int(np.isin(visual, index).sum()) for index in cuts)
    plan = prompt_plan(checkpoint, seen.prompt, schedule, seen.generation.keep)
    return Case(
        name=seen.question.name,
        prompt=seen.question.prompt,
        answer=seen.generation.answer,
        reference_answer=seen.answer_text,
        unpruned_answer=seen.unpruned_text,
        prompt_tokens=seen.prompt.input_ids.shape[1],
        visual_tokens=len(visual),
        kept_tokens=kept[-1] if kept else len(visual),
        kept_by_cut=kept,
        kept_overlap=_overlap(seen, schedule),
        pictures=kept_pictures(
            seen.prompt, cuts, numbers=None if seen.question.clip else seen.question.pictures
        ),
        first_token_flops=plan.first_token,
        prefill_flops=plan.prefill_flops,
    )


def _overlap(seen: Observation, schedule: Schedule) -> float:
    """Mean over cuts of the share of the oracle's own choice that the bundle keeps."""
    shares = []
    for number, (trace, cut) in enumerate(zip(seen.given.cuts, schedule.cuts, strict=False)):
        own = trace.arrived[choose(cut.chooser, trace.tokens, seen.budgets[number]).kept].numpy()
        shares.append(float(np.isin(own, seen.got.cuts[number].kept_index).mean()) if len(own) else 1.0)
    return float(np.mean(shares)) if shares else 1.0

"""Validate a bundle against Hugging Face: run both on the same prompts, compare stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ep_export.bundle import Bundle, Precision
from ep_export.errors import UserError
from ep_export.progress import Progress, silent
from ep_export.reference import PruneSpec, load_model
from ep_export.runtime import Session
from ep_export.validate.comparison import Finding
from ep_export.validate.node_check import NodeRunner
from ep_export.validate.observe import Observation, Oracle, Question, observe
from ep_export.validate.report import Case, KeptPicture, Report
from ep_export.validate.setting import Setting
from ep_export.validate.stages import find, fold_stages

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.checkpoint import Checkpoint

__all__ = ["validate", "vision_layers"]

_DTYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
_DEPTHS = ("depth", "num_hidden_layers")
"""What vision configs call their number of layers."""


def validate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    *,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    max_new_tokens: int = 16,
    progress: Progress = silent,
) -> Report:
    """Compare a bundle, run by ONNX Runtime, with the pruned Hugging Face model it was made from.

    Every picture is asked about with one of the prompts in turn (and every prompt is used); then come one
    prompt with two pictures, where there are two, and one without a picture. The oracle is float32 with exact
    float64 scores. Hidden states, logits, caches and answers are compared given the bundle's kept set, so
    that a near-tie among tokens is not taken for an error in arithmetic.

    Args:
        bundle: The bundle.
        checkpoint: What it was built from.
        pictures: At least one.
        prompts: At least one question.
        max_new_tokens: Longest greedy answer compared.
        progress: Told about every prompt.

    Raises:
        UserError: Nothing to ask, another checkpoint, or a bundle ONNX Runtime cannot run.
    """
    if not pictures or not prompts:
        raise UserError(
            f"validation got {len(pictures)} pictures and {len(prompts)} prompts, expected some of each",
            hint="give a picture and a question",
        )
    manifest = bundle.manifest
    if manifest.model_sha256 != checkpoint.fingerprint:
        raise UserError(
            f"bundle {bundle.path} was built from another checkpoint than {checkpoint.source}",
            hint=f"give the checkpoint it names: {manifest.model}",
        )
    questions = _questions(len(pictures), prompts)
    plan = PruneSpec(manifest.policy, manifest.keep)
    node = NodeRunner(bundle.file(manifest.component("decoder_head").file))
    setting = Setting(manifest, node, vision_layers(checkpoint.config))
    findings: list[tuple[Finding, ...]] = []
    cases: list[Case] = []
    with Session.open(bundle) as session:
        half_type = _DTYPES.get(manifest.precision)
        half = load_model(checkpoint, half_type) if half_type is not None else None
        oracle = Oracle(load_model(checkpoint), half, plan)
        progress("validate", 0, len(questions))
        for question in questions:
            observation = observe(session, oracle, question, pictures, max_new_tokens)
            findings.append(find(setting, observation))
            cases.append(_case(observation))
            progress("validate", len(cases), len(questions))
    return Report(
        subject=manifest.model,
        settings=_settings(bundle),
        stages=fold_stages(findings),
        cases=tuple(cases),
    )


def _questions(pictures: int, prompts: Sequence[str]) -> list[Question]:
    asked = [
        Question(f"question {i + 1}", (i % pictures,), prompts[i % len(prompts)])
        for i in range(max(pictures, len(prompts)))
    ]
    if pictures > 1:
        asked.append(Question("two pictures", (0, 1), prompts[0]))
    asked.append(Question("no picture", (), prompts[0]))
    return asked


def vision_layers(config: Any) -> int:
    """Depth of a config's vision encoder."""
    vision = config.vision_config
    return int(next(getattr(vision, name) for name in _DEPTHS if hasattr(vision, name)))


def _settings(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "policy": str(manifest.policy),
        "evidence": manifest.evidence.summary,
        "keep": f"{manifest.keep} on average over {manifest.dims.layers} layers",
        "precision": manifest.precision.value,
        "dialect": f"{manifest.dialect.value}, opset {manifest.opset}",
        "scores": f"entropy series of degree {manifest.degree}",
        "kept set": "hidden states, logits, caches and answers are compared given the bundle's own",
        "bundle run by": "ONNX Runtime, CPU",
        "oracle": "Hugging Face transformers, float32, exact float64 scores",
    }


def _case(seen: Observation) -> Case:
    own = seen.oracle_visual
    overlap = len(np.intersect1d(seen.kept_visual, own)) / len(own) if len(own) else 1.0
    kept = np.isin(seen.prompt.visual_index, seen.got.kept_index)
    shown, start = [], 0
    for number, picture in zip(seen.question.pictures, seen.prompt.pictures, strict=True):
        stop = start + picture.visual_tokens
        cells = tuple(picture.kept_cells(kept[start:stop]).tolist())
        shown.append(KeptPicture(number, picture.token_grid, cells, picture.view))
        start = stop
    return Case(
        name=seen.question.name,
        prompt=seen.question.prompt,
        answer=seen.generation.answer,
        reference_answer=seen.answer_text,
        prompt_tokens=seen.prompt.input_ids.shape[1],
        visual_tokens=len(seen.prompt.visual_index),
        kept_tokens=len(seen.kept_visual),
        kept_overlap=overlap,
        pictures=tuple(shown),
    )

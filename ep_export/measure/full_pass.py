"""The unpruned model over one prompt and an answer, run once: what every way of pruning starts from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ep_export.measure.layer_curves import LayerCurves, record_curves
from ep_export.reference.spans import SpanRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ep_export.families.base import Family, PromptInputs
    from ep_export.policy import Source

__all__ = ["FullPass", "before_placeholder", "run_full"]


@dataclass(frozen=True)
class FullPass:
    """The unpruned model over prompt and an answer, usually its own.

    Attributes:
        visual_index: [N] int64 prompt positions, on the model's device.
        prompt_length: S, tokens of the prompt.
        length: Prompt and answer positions fed (the last answer token predicts nothing and is left out).
        log_probs: [answer, vocab] float32 at the positions that predict the answer.
        hidden: K -> [1, length, d], what enters layer K.
        projections: K -> by source what layer K-1 projects, [1, length, heads * head_dim]; K = 0 has none.
        arguments: Layer -> keyword arguments it was called with.
        curves: Entropies and metrics of every layer; None unless asked for.
    """

    visual_index: torch.Tensor
    prompt_length: int
    length: int
    log_probs: torch.Tensor
    hidden: dict[int, torch.Tensor]
    projections: dict[int, dict[Source, torch.Tensor]]
    arguments: dict[int, dict[str, Any]]
    curves: LayerCurves | None = None


def run_full(
    model: PreTrainedModel,
    family: Family,
    prompt: PromptInputs,
    answer: Sequence[int],
    *,
    layers: Iterable[int],
    projections: bool = True,
    entropies: bool = False,
    metrics: bool = False,
) -> FullPass:
    """Run prompt and answer through the unpruned model once.

    Args:
        model: From `load_model`, on any device.
        family: Its family.
        prompt: With at least one visual token.
        answer: What is fed after the prompt, at least one token; the last is only predicted.
        layers: Layers K whose states are kept; what enters the decoder (K = 0) always is.
        projections: Also keep what the layers before them project, more than half of what is kept.
        entropies: Also compute every layer's entropies.
        metrics: With them the layer metrics.
    """
    decoder = family.decoder(model)
    ids = np.concatenate([prompt.input_ids, np.asarray([answer[:-1]], dtype=np.int64)], axis=1)
    inputs = family.reference_inputs(replace(prompt, input_ids=ids), model.config)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    visual = torch.from_numpy(prompt.visual_index).to(model.device)
    last = len(decoder.layers)
    recorder = SpanRecorder(decoder, {0, *layers, last}, projections=projections, arguments=True)
    length = prompt.input_ids.shape[1]
    with ExitStack() as undo, torch.inference_mode():
        recorder.install(undo)
        curves = record_curves(decoder, visual, length, undo, metrics=metrics) if entropies else None
        model(**inputs, use_cache=False, logits_to_keep=1)
        logits = decoder.lm_head(decoder.norm(recorder.hidden[last][0, -len(answer) :]))
    return FullPass(
        visual_index=visual,
        prompt_length=length,
        length=ids.shape[1],
        log_probs=logits.float().log_softmax(dim=-1),
        hidden=recorder.hidden,
        projections=recorder.projections,
        arguments=recorder.arguments,
        curves=curves,
    )


def before_placeholder(answer: list[int], config: PreTrainedConfig) -> list[int]:
    """Cut an answer after its first picture placeholder: fed back, it would ask for another picture."""
    from ep_export.reference import visual_positions

    places = visual_positions(torch.tensor(answer), config)
    return answer[: int(places[0]) + 1] if len(places) else answer

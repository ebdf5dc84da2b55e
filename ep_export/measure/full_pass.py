"""The unpruned model over one prompt and an answer, run once: what every way of pruning starts from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ep_export.entropy import layer_entropy
from ep_export.reference.spans import SpanRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ep_export.families.base import DecoderModules, Family, PromptInputs
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
        query_entropy: [L] nats; empty unless asked for.
        key_entropy: [L] nats.
    """

    visual_index: torch.Tensor
    prompt_length: int
    length: int
    log_probs: torch.Tensor
    hidden: dict[int, torch.Tensor]
    projections: dict[int, dict[Source, torch.Tensor]]
    arguments: dict[int, dict[str, Any]]
    query_entropy: tuple[float, ...] = ()
    key_entropy: tuple[float, ...] = ()


def run_full(
    model: PreTrainedModel,
    family: Family,
    prompt: PromptInputs,
    answer: Sequence[int],
    *,
    layers: Iterable[int],
    entropies: bool = False,
) -> FullPass:
    """Run prompt and answer through the unpruned model once.

    Args:
        model: From `load_model`, on any device.
        family: Its family.
        prompt: With at least one visual token.
        answer: What is fed after the prompt, at least one token; the last is only predicted.
        layers: Layers K whose states are kept; what enters the decoder (K = 0) always is.
        entropies: Also compute every layer's entropies.
    """
    decoder = family.decoder(model)
    ids = np.concatenate([prompt.input_ids, np.asarray([answer[:-1]], dtype=np.int64)], axis=1)
    inputs = family.reference_inputs(replace(prompt, input_ids=ids), model.config)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    visual = torch.from_numpy(prompt.visual_index).to(model.device)
    last = len(decoder.layers)
    recorder = SpanRecorder(decoder, {0, *layers, last}, arguments=True)
    curves = _EntropyCurves(visual)
    with ExitStack() as undo, torch.inference_mode():
        recorder.install(undo)
        if entropies:
            curves.install(decoder, undo)
        model(**inputs, use_cache=False, logits_to_keep=1)
        logits = decoder.lm_head(decoder.norm(recorder.hidden[last][0, -len(answer) :]))
    return FullPass(
        visual_index=visual,
        prompt_length=prompt.input_ids.shape[1],
        length=ids.shape[1],
        log_probs=logits.float().log_softmax(dim=-1),
        hidden=recorder.hidden,
        projections=recorder.projections,
        arguments=recorder.arguments,
        query_entropy=tuple(curves.query),
        key_entropy=tuple(curves.key),
    )


def before_placeholder(answer: list[int], config: PreTrainedConfig) -> list[int]:
    """Cut an answer after its first picture placeholder: fed back, it would ask for another picture."""
    from ep_export.reference import visual_positions

    places = visual_positions(torch.tensor(answer), config)
    return answer[: int(places[0]) + 1] if len(places) else answer


class _EntropyCurves:
    """Entropy of the visual tokens' queries and keys, layer by layer while they are computed."""

    def __init__(self, visual: torch.Tensor) -> None:
        self._visual = visual
        self.query: list[float] = []
        self.key: list[float] = []

    def install(self, decoder: DecoderModules, undo: ExitStack) -> None:
        """Register every hook; `undo` removes them."""
        for layer in decoder.layers:
            attention: Any = layer.self_attn
            for projection, curve in ((attention.q_proj, self.query), (attention.k_proj, self.key)):
                undo.callback(projection.register_forward_hook(self._measure(curve)).remove)

    def _measure(self, curve: list[float]) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            curve.append(layer_entropy(output[0, self._visual]))

        return hook

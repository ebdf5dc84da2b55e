"""Calibrated rounding of a whole decoder: layer after layer, each on what the rounded ones before it give.

Pictures run once through the vision encoder and the embeddings; from there every layer sees all prompts,
leaves the second moments of what enters its linear layers, is rounded, and runs again as rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from ep_export.reference.spans import SpanRecorder, run_layers
from ep_export.weights.gptq_rounding import Moments, round_calibrated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ep_export.families.base import Family, PromptInputs
    from ep_export.numerics import Weights
    from ep_export.weights.packed import PackedLinear

__all__ = ["calibrate_layers"]


def calibrate_layers(
    model: PreTrainedModel,
    family: Family,
    prompts: Sequence[PromptInputs],
    weights: Weights,
    *,
    scale_type: str,
) -> Iterator[tuple[str, PackedLinear]]:
    """Round every linear layer of the decoder; `model` holds the rounded weights afterwards.

    Args:
        model: In float32, on any device; its decoder layers are changed.
        family: Its family.
        prompts: At least one, with pictures.
        weights: int4 or int8, and the group.
        scale_type: See `round_nearest`.

    Yields:
        Name of a weight in the Hugging Face model, and its rounded layer; in the order of the layers.
    """
    decoder = family.decoder(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with torch.inference_mode():
        passes = [_enter(model, family, prompt) for prompt in prompts]
        for index, layer in enumerate(decoder.layers):
            linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
            moments: dict[int, Moments] = {}
            with ExitStack() as undo:
                for linear in linears:
                    undo.callback(linear.register_forward_pre_hook(_gather(moments)).remove)
                for recorder in passes:
                    run_layers(decoder, recorder.hidden[0], range(index, index + 1), recorder.arguments)
            for linear in linears:
                name = names[id(linear.weight)]
                packed = round_calibrated(
                    linear.weight.float().T.cpu().numpy(),
                    moments[id(linear)],
                    weights,
                    scale_type=scale_type,
                    name=name,
                )
                linear.weight.copy_(torch.from_numpy(packed.dequantised()).T)
                yield name, packed
            for recorder in passes:
                layers = range(index, index + 1)
                recorder.hidden[0] = run_layers(decoder, recorder.hidden[0], layers, recorder.arguments)


def _enter(model: PreTrainedModel, family: Family, prompt: PromptInputs) -> SpanRecorder:
    """What enters layer 0 for a prompt, and the arguments every layer is called with."""
    recorder = SpanRecorder(family.decoder(model), [0], arguments=True)
    inputs = family.reference_inputs(prompt, model.config)
    with ExitStack() as undo:
        recorder.install(undo)
        model(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False, logits_to_keep=1)
    return recorder


def _gather(moments: dict[int, Moments]) -> Any:
    def hook(linear: torch.nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
        if id(linear) not in moments:
            moments[id(linear)] = Moments(linear.in_features)
        moments[id(linear)].add(args[0])

    return hook

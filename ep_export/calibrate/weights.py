"""Calibrated rounding of a whole decoder: layer after layer, each on what the rounded ones before it give.

Pictures run once through the vision encoder and the embeddings; from there every layer sees all prompts,
leaves the second moments of what enters its linear layers, is rounded, and runs again as rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ep_export.reference import load_model
from ep_export.reference.spans import SpanRecorder, run_layers
from ep_export.weights.gptq_rounding import Moments, round_calibrated
from ep_export.weights.packing import Packing, scale_type

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import Family, PromptInputs
    from ep_export.numerics import Weights
    from ep_export.weights.packed import PackedLinear

__all__ = ["calibrate_layers", "calibrated"]


def calibrated(
    checkpoint: Checkpoint,
    weights: Weights,
    pictures: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    compute: str,
) -> Packing:
    """Round the checkpoint's own weights by what enters its layers on some pictures.

    Args:
        checkpoint: Unquantised.
        weights: int4 or int8, and the group.
        pictures: At least one.
        questions: One a picture.
        compute: What graphs compute in: "fp32", "fp16" or "bf16".
    """

    def layers(_names: Sequence[str]) -> Iterator[tuple[str, PackedLinear]]:
        builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
        prompts = [builder.build([p], q) for p, q in zip(pictures, questions, strict=True)]
        model = load_model(checkpoint)
        yield from calibrate_layers(model, checkpoint.family, prompts, weights, scales=scale_type(compute))

    return Packing(replace(weights, rounding="gptq"), layers)


def calibrate_layers(
    model: PreTrainedModel,
    family: Family,
    prompts: Sequence[PromptInputs],
    weights: Weights,
    *,
    scales: str,
) -> Iterator[tuple[str, PackedLinear]]:
    """Round every linear layer of the decoder; `model` holds the rounded weights afterwards.

    Args:
        model: In float32, on any device; its decoder layers are changed.
        family: Its family.
        prompts: At least one, with pictures.
        weights: int4 or int8, and the group.
        scales: See `scale_type`.

    Yields:
        Name of a weight in the Hugging Face model, and its rounded layer; in the order of the layers.
    """
    decoder = family.decoder(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with torch.inference_mode():
        passes = [_enter(model, family, prompt) for prompt in prompts]
        for index, layer in enumerate(decoder.layers):
            linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
            inputs = _Inputs()
            with ExitStack() as undo:
                for linear in linears:
                    undo.callback(linear.register_forward_pre_hook(inputs.add).remove)
                for recorder in passes:
                    run_layers(decoder, recorder.hidden[0], range(index, index + 1), recorder.arguments)
            for linear in linears:
                name = names[id(linear.weight)]
                packed = round_calibrated(
                    linear.weight.float().T.cpu().numpy(),
                    inputs.moments[id(linear)],
                    weights,
                    scale_type=scales,
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


class _Inputs:
    """Second moments of what enters linear layers; those that are given one tensor share them."""

    def __init__(self) -> None:
        self.moments: dict[int, Moments] = {}
        self._last: torch.Tensor | None = None
        self._shared: Moments | None = None

    def add(self, linear: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A hook: what enters a layer, in the order the layers are called in."""
        if args[0] is not self._last:
            self._last = args[0]
            self._shared = self.moments.get(id(linear)) or Moments(args[0].shape[-1])
            self._shared.add(args[0])
        assert self._shared is not None  # noqa: S101 - set with the first tensor
        self.moments[id(linear)] = self._shared

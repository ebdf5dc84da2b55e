"""Calibrated rounding of a whole decoder: layer after layer, each on what the rounded ones before it give.

Pictures run once through the vision encoder and the embeddings; from there every layer sees all prompts,
leaves the second moments of what enters its linear layers, is rounded, and runs again as rounded. Weights of
one layer are in memory at a time, besides the second moments and what every prompt has come to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ep_export.bundle import hash_file
from ep_export.errors import UserError
from ep_export.export.packing import linear_weights, pack
from ep_export.numerics import WeightKind
from ep_export.progress import Progress, silent
from ep_export.reference.spans import SpanRecorder, run_layers
from ep_export.reference.streamed import StreamedModel
from ep_export.weights.gptq_rounding import Moments, round_calibrated
from ep_export.weights.packing import Packing, nearest, scale_type

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import DecoderModules, Family, PromptInputs
    from ep_export.numerics import Weights
    from ep_export.weights.packed import PackedLinear

__all__ = ["ROUNDING_PICTURES", "calibrate_layers", "calibrated", "rounded_shard"]

ROUNDING_PICTURES = 24
"""With 24 pictures of 100 and more tokens every layer sees thousands of rows."""

_COMPUTE = "fp16"  # of the bundles that are measured for: it decides the type of scales


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
        streamed = StreamedModel(checkpoint)
        yield from calibrate_layers(
            streamed.model,
            checkpoint.family,
            prompts,
            weights,
            scales=scale_type(compute),
            held=streamed.held,
        )

    return Packing(replace(weights, rounding="gptq"), layers)


@contextmanager
def rounded_shard(
    checkpoint: Checkpoint,
    weights: Weights | None,
    pictures: Sequence[Image.Image] = (),
    questions: Sequence[str] = (),
    *,
    progress: Progress = silent,
) -> Iterator[Path | None]:
    """What a bundle of these weights would hold, to measure a model that has them dequantised.

    Args:
        checkpoint: Unquantised.
        weights: Kind and group; None for the checkpoint's own weights.
        pictures: To round by what enters the layers, as `build --images` does; without any, to the nearest.
        questions: One a picture.
        progress: Told about every layer.

    Yields:
        A shard for `load_model(quantised=stored_layers([shard]))`, its name a digest of what is in it; gone
        when the block ends. None without weights.

    Raises:
        UserError: The checkpoint is quantised already, or a layer cannot be rounded.
    """
    if weights is None:
        yield None
        return
    if checkpoint.published is not None:
        raise UserError(
            f"{checkpoint.source} is quantized already, by {checkpoint.published.layout}",
            hint="leave out --weights: it is measured as it is",
        )
    if pictures and weights.kind is not WeightKind.FP8:
        packing = calibrated(checkpoint, weights, pictures, questions, compute=_COMPUTE)
    else:
        packing = nearest(checkpoint.tensors, weights, compute=_COMPUTE)
    with tempfile.TemporaryDirectory(prefix="ep-export-weights-") as directory:
        file = Path(directory) / "layers"
        pack(checkpoint, linear_weights(checkpoint), packing, file, compute=_COMPUTE, progress=progress)
        yield file.rename(file.with_name(f"{weights.kind.value}-{hash_file(file)[:16]}.safetensors"))


def calibrate_layers(
    model: PreTrainedModel,
    family: Family,
    prompts: Sequence[PromptInputs],
    weights: Weights,
    *,
    scales: str,
    held: Callable[[torch.nn.Module], AbstractContextManager[None]],
) -> Iterator[tuple[str, PackedLinear]]:
    """Round every linear layer of the decoder.

    Args:
        model: In float32, on the CPU; the weights of its decoder layers are changed.
        family: Its family.
        prompts: At least one, with pictures.
        weights: int4 or int8, and the group.
        scales: See `scale_type`.
        held: See `StreamedModel.held`.

    Yields:
        Name of a weight in the Hugging Face model, and its rounded layer; in the order of the layers.
    """
    decoder = family.decoder(model)
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    with torch.inference_mode():
        passes = [_enter(model, family, prompt) for prompt in prompts]
        for index, layer in enumerate(decoder.layers):
            linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
            with held(layer):
                moments = _moments(decoder, index, linears, passes)
                while linears:
                    linear = linears.pop(0)
                    name = names[id(linear)]
                    weight = linear.weight.T.numpy()
                    packed = round_calibrated(
                        weight, moments.pop(linear), weights, scale_type=scales, name=name
                    )
                    linear.weight.copy_(torch.from_numpy(packed.dequantised()).T)
                    yield name, packed
                for recorder in passes:
                    recorder.hidden[0] = _run_layer(decoder, index, recorder)


def _moments(
    decoder: DecoderModules, index: int, linears: Sequence[torch.nn.Module], passes: Sequence[SpanRecorder]
) -> dict[torch.nn.Module, Moments]:
    """Second moments of what enters linear layers of one decoder layer, over all prompts."""
    inputs = _Inputs()
    with ExitStack() as undo:
        for linear in linears:
            undo.callback(linear.register_forward_pre_hook(inputs.add).remove)
        for recorder in passes:
            _run_layer(decoder, index, recorder)
    return inputs.moments


def _run_layer(decoder: DecoderModules, index: int, recorder: SpanRecorder) -> torch.Tensor:
    return run_layers(decoder, recorder.hidden[0], range(index, index + 1), recorder.arguments)


def _enter(model: PreTrainedModel, family: Family, prompt: PromptInputs) -> SpanRecorder:
    """What enters layer 0 for a prompt, and the arguments every layer is called with; no layer computes."""
    decoder = family.decoder(model)
    recorder = SpanRecorder(decoder, [0], arguments=True)
    inputs = family.reference_inputs(prompt, model.config)
    with ExitStack() as undo, suppress(_AllEntered):
        recorder.install(undo)
        undo.callback(decoder.norm.register_forward_pre_hook(_stop).remove)
        for layer in decoder.layers:
            layer.forward = _unchanged
            undo.callback(delattr, layer, "forward")
        model(**inputs, use_cache=False)
    return recorder


class _AllEntered(Exception):  # noqa: N818 - no error: the end of what is of interest
    """Every layer was called."""


def _stop(_norm: torch.nn.Module, _args: Any) -> None:
    raise _AllEntered


def _unchanged(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return hidden_states


class _Inputs:
    """Second moments of what enters linear layers; those that are given one tensor share them."""

    def __init__(self) -> None:
        self.moments: dict[torch.nn.Module, Moments] = {}
        self._last: torch.Tensor | None = None
        self._shared: Moments | None = None

    def add(self, linear: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A hook: what enters a layer, in the order the layers are called in."""
        if args[0] is not self._last:
            self._last = args[0]
            self._shared = self.moments.get(linear) or Moments(args[0].shape[-1])
            self._shared.add(args[0])
        assert self._shared is not None  # noqa: S101 - set with the first tensor
        self.moments[linear] = self._shared

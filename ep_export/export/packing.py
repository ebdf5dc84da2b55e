"""Quantised layers are written into a shard of their own, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    from pathlib import Path

    from ep_export.checkpoint import Checkpoint
    from ep_export.weights.packed import PackedLinear
    from ep_export.weights.packing import Packing
    from ep_export.weights.store import StoredLinear

__all__ = ["BLOCKS_OPSET", "DecoderWeights", "decoder_weights", "pack", "published_packing"]

BLOCKS_OPSET = 21
"""The first with INT4 and DequantizeLinear over blocks."""

_COMPUTE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_STAGE = "quantise"


@dataclass(frozen=True)
class DecoderWeights:
    """Names, in the Hugging Face model, of the weights that may be quantised.

    Attributes:
        linears: Of the decoder's linear layers, in order; not those of the vision tower, nor lm_head.
        lm_head: The embedding's where they are one tensor.
    """

    linears: tuple[str, ...]
    lm_head: str


def decoder_weights(checkpoint: Checkpoint) -> DecoderWeights:
    """What of a checkpoint may be quantised."""
    import torch

    from ep_export.checkpoint import meta_model

    model = meta_model(checkpoint.config)
    decoder = checkpoint.family.decoder(model)
    parameters = list(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in parameters}
    linears = tuple(
        names[id(module.weight)]
        for layer in decoder.layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    )
    stored = [
        name
        for name, parameter in parameters
        if parameter is decoder.lm_head.weight and (name in checkpoint.tensors or name in checkpoint.packed)
    ]
    return DecoderWeights(linears, stored[-1])


def published_packing(checkpoint: Checkpoint, decoder: DecoderWeights) -> Packing:
    """The layers of a quantised checkpoint as they were published.

    Raises:
        UserError: A layer is quantised that no graph reads so: of the vision tower, say.
    """
    from ep_export.checkpoint.packed_layers import read_packed
    from ep_export.weights.packing import Packing

    assert checkpoint.published is not None  # noqa: S101 - the caller looked
    other = set(checkpoint.packed) - {*decoder.linears, decoder.lm_head}
    if other:
        raise UserError(
            f"{checkpoint.source} has {min(other)} quantized, expected layers of the decoder alone",
            hint="give a checkpoint whose vision tower is not quantized",
        )

    def layers(names: Sequence[str]) -> Iterator[tuple[str, PackedLinear]]:
        for name in names:
            yield name, read_packed(checkpoint.packed[name])

    return Packing(checkpoint.published.weights, layers)


def pack(
    checkpoint: Checkpoint,
    decoder: DecoderWeights,
    packing: Packing,
    file: Path,
    *,
    compute: str,
    progress: Progress = silent,
) -> dict[str, StoredLinear]:
    """Write a shard of quantised layers.

    With 4-bit and 8-bit integers lm_head is stored in 8 bits as well.

    Args:
        checkpoint: Whose layers they are.
        decoder: Its weights; of a quantised checkpoint those are taken that it has quantised.
        packing: Where quantised layers come from.
        file: The shard; must not exist.
        compute: What graphs compute in: "fp32", "fp16" or "bf16".
        progress: Told about every layer.

    Returns:
        Name of a weight -> where its quantised form lies.

    Raises:
        UserError: A layer cannot be quantised, or is missing from the packing.
    """
    from ep_export.weights.packing import nearest
    from ep_export.weights.store import LayerWriter

    stored: dict[str, StoredLinear] = {}
    names = tuple(checkpoint.packed) or decoder.linears
    progress(_STAGE, 0, len(names))
    with LayerWriter(file, layers=len(names) + 1, scale_type=_COMPUTE[compute]) as writer:
        for name, linear in packing.layers(names):
            stored[name] = writer.add(name, linear)
            progress(_STAGE, len(stored), len(names))
        missing = set(names) - set(stored)
        if missing:
            raise UserError(f"layer {min(missing)} was not quantised", hint="fetch the checkpoint again")
        last = decoder.lm_head
        if packing.weights.kind is not WeightKind.FP8 and last not in stored:
            eight = Weights(WeightKind.INT8, None, "nearest")
            for name, linear in nearest(checkpoint.tensors, eight, compute=compute).layers([last]):
                stored[name] = writer.add(name, linear)
    return stored

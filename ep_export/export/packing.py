"""Quantised layers are written into a shard of their own, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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

__all__ = ["BLOCKS_OPSET", "LinearWeights", "linear_weights", "pack", "published_packing"]

BLOCKS_OPSET = 21
"""The first with INT4 and DequantizeLinear over blocks."""

_COMPUTE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_STAGE = "quantise"


@dataclass(frozen=True)
class LinearWeights:
    """Names, in the Hugging Face model, of the weights that may be quantised.

    Attributes:
        decoder: Of the decoder's linear layers, in order, but lm_head.
        lm_head: The embedding's where they are one tensor.
        vision: Of the linear layers in the blocks of the vision encoders.
    """

    decoder: tuple[str, ...]
    lm_head: str
    vision: tuple[str, ...]

    def rounded(self, weights: Weights) -> tuple[str, ...]:
        """Those that nothing reads as the checkpoint has them; lm_head's may be the embedding's too."""
        return self.decoder if weights.vision is None else (*self.decoder, *self.vision)


def linear_weights(checkpoint: Checkpoint) -> LinearWeights:
    """What of a checkpoint may be quantised."""
    import torch

    from ep_export.checkpoint import meta_model

    model = meta_model(checkpoint.config)
    decoder = checkpoint.family.decoder(model)
    parameters = list(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in parameters}

    def linears(parts: Iterable[torch.nn.Module]) -> tuple[str, ...]:
        modules = (module for part in parts for module in part.modules())
        return tuple(names[id(each.weight)] for each in modules if isinstance(each, torch.nn.Linear))

    blocks = [block for tower in checkpoint.family.encoders(model).values() for block in tower.blocks]
    stored = [
        name
        for name, parameter in parameters
        if parameter is decoder.lm_head.weight and (name in checkpoint.tensors or name in checkpoint.packed)
    ]
    return LinearWeights(linears(decoder.layers), stored[-1], linears(blocks))


def published_packing(checkpoint: Checkpoint, linears: LinearWeights) -> Packing:
    """The layers of a quantised checkpoint as they were published.

    Raises:
        UserError: A layer is quantised that no graph reads so: of the vision tower, say.
    """
    from ep_export.checkpoint.packed_layers import read_packed
    from ep_export.weights.packing import Packing

    assert checkpoint.published is not None  # noqa: S101 - the caller looked
    other = set(checkpoint.packed) - {*linears.decoder, linears.lm_head}
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
    linears: LinearWeights,
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
        linears: Its weights; of a quantised checkpoint those are taken that it has quantised.
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
    names = tuple(checkpoint.packed) or linears.decoder
    eight = [] if packing.weights.kind is WeightKind.FP8 or linears.lm_head in names else [linears.lm_head]
    eight += linears.vision if packing.weights.vision else ()
    plain = nearest(checkpoint.tensors, Weights(WeightKind.INT8, None, "nearest"), compute=compute)
    total = len(names) + len(eight)
    progress(_STAGE, 0, total)
    with LayerWriter(file, layers=total, scale_type=_COMPUTE[compute]) as writer:
        for name, linear in chain(packing.layers(names), plain.layers(eight)):
            stored[name] = writer.add(name, linear)
            progress(_STAGE, len(stored), total)
        missing = set(names) - set(stored)
        if missing:
            raise UserError(f"layer {min(missing)} was not quantised", hint="fetch the checkpoint again")
    return stored

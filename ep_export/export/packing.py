"""Quantised layers are written into a shard of the bundle's own, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ep_export.bundle import Precision
from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.progress import Progress

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint
    from ep_export.export.shards import Shards
    from ep_export.weights.packed import PackedLinear
    from ep_export.weights.packing import Packing
    from ep_export.weights.store import StoredLinear

__all__ = ["BLOCKS_OPSET", "linear_names", "pack", "published_packing"]

BLOCKS_OPSET = 21
"""The first with INT4 and DequantizeLinear over blocks."""

_COMPUTE = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}
_STAGE = "quantise"


def published_packing(checkpoint: Checkpoint) -> Packing:
    """The layers of a quantised checkpoint as they were published.

    Raises:
        UserError: A layer is quantised that no graph reads so: of the vision tower, say.
    """
    from ep_export.checkpoint.packed_layers import read_packed
    from ep_export.weights.packing import Packing

    assert checkpoint.published is not None  # noqa: S101 - the caller looked
    other = set(checkpoint.packed) - set(linear_names(checkpoint)) - {_lm_head(checkpoint)}
    if other:
        raise UserError(
            f"{checkpoint.source} has {min(other)} quantized, expected layers of the decoder alone",
            hint="give a checkpoint whose vision tower is not quantized",
        )

    def layers(names: Sequence[str]) -> Iterator[tuple[str, PackedLinear]]:
        for name in names:
            yield name, read_packed(checkpoint.packed[name])

    return Packing(checkpoint.published.weights, layers)


def linear_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Weights of the decoder's linear layers, in order; not those of the vision tower, nor lm_head."""
    import torch

    from ep_export.checkpoint import meta_model

    model = meta_model(checkpoint.config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return tuple(
        names[id(module.weight)]
        for layer in checkpoint.family.decoder(model).layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    )


def pack(
    checkpoint: Checkpoint,
    names: Sequence[str],
    packing: Packing,
    shards: Shards,
    precision: Precision,
    progress: Progress,
) -> dict[str, StoredLinear]:
    """Quantise layers into the bundle's own shard.

    With 4-bit and 8-bit integers lm_head is stored in 8 bits as well.

    Args:
        checkpoint: Whose layers they are.
        names: From `linear_names`.
        packing: Where quantised layers come from.
        shards: Of the bundle; gets the new one.
        precision: Arithmetic of the graphs.
        progress: Told about every layer.

    Returns:
        Name of a weight -> where its quantised form lies.

    Raises:
        UserError: A layer cannot be quantised, or is missing from the packing.
    """
    from ep_export.weights.packing import nearest
    from ep_export.weights.store import FILE, LayerWriter

    stored: dict[str, StoredLinear] = {}
    file = shards.own(FILE)
    progress(_STAGE, 0, len(names))
    with LayerWriter(file, layers=len(names) + 1, scale_type=_COMPUTE[precision]) as writer:
        for name, linear in packing.layers(names):
            stored[name] = writer.add(name, linear)
            progress(_STAGE, len(stored), len(names))
        missing = set(names) - set(stored)
        if missing:
            raise UserError(f"layer {min(missing)} was not quantised", hint="fetch the checkpoint again")
        last = _lm_head(checkpoint)
        if packing.weights.kind is not WeightKind.FP8 and last not in stored:
            eight = Weights(WeightKind.INT8, None, "nearest")
            for name, linear in nearest(checkpoint.tensors, eight, compute=precision.value).layers([last]):
                stored[name] = writer.add(name, linear)
    shards.add(file)
    return stored


def _lm_head(checkpoint: Checkpoint) -> str:
    """Name of lm_head's weight in the checkpoint: the embedding's where they are one tensor."""
    from ep_export.checkpoint import meta_model

    model = meta_model(checkpoint.config)
    decoder = checkpoint.family.decoder(model)
    own: list[str] = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is decoder.lm_head.weight and (name in checkpoint.tensors or name in checkpoint.packed)
    ]
    return own[-1]

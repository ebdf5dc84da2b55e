"""Layers that a published checkpoint stores quantised: several tensors in place of one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ep_export.safetensors_index import TensorRef, read_tensor
from ep_export.weights.packed import PackedLinear
from ep_export.weights.published import Published, layer_and_part

__all__ = ["PACKED", "PackedLayer", "read_packed", "split_layers"]

PACKED = "packed"
"""dtype of what stands for a quantised weight while names are matched."""


@dataclass(frozen=True)
class PackedLayer:
    """A quantised linear layer as it was published.

    Attributes:
        name: Of the layer on disk, for messages.
        published: Its layout.
        parts: Its tensors by the last part of their names.
        shape: (in, out).
    """

    name: str
    published: Published
    parts: Mapping[str, TensorRef]
    shape: tuple[int, int]


def split_layers(
    tensors: Mapping[str, TensorRef], published: Published
) -> tuple[dict[str, TensorRef], dict[str, dict[str, TensorRef]]]:
    """Tell quantised layers from other tensors.

    Returns:
        Tensors by name, a stand-in of type `PACKED` named `<layer>.weight` for every quantised one; and that
        name -> the layer's tensors by the last part of their names.
    """
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        layer, part = layer_and_part(name, published.parts) or ("", "")
        # modules that were left as they are have a weight as well, but no scales
        if layer and f"{layer}.{published.parts[0]}" in tensors:
            found.setdefault(f"{layer}.weight", {})[part] = ref
    taken = {ref.name for parts in found.values() for ref in parts.values()}
    plain = {name: ref for name, ref in tensors.items() if name not in taken}
    for name, parts in found.items():
        first = next(iter(parts.values()))
        plain[name] = TensorRef(name, first.file, 0, 0, PACKED, ())
    return plain, found


def read_packed(layer: PackedLayer) -> PackedLinear:
    """Read and check one layer.

    Raises:
        UserError: See `ep_export.weights.layouts`.
    """
    arrays = {part: read_tensor(ref) for part, ref in layer.parts.items()}
    return layer.published.read(layer.name, arrays, shape=layer.shape)

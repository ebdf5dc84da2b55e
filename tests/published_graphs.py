"""Graphs of published shapes, built on `meta`: no weight is there, so none can end up in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ep_export.bundle import Dialect, Precision
from ep_export.checkpoint import TensorRef, meta_model
from ep_export.export.decoder import build_embed_tokens, build_span
from ep_export.export.dialects import FORMS, write_norms
from ep_export.export.graph_builder import TORCH_DTYPES, GraphBuilder, Weights
from ep_export.export.vision import build_vision
from ep_export.families.attention import use_vision_forms
from ep_export.families.base import Family

__all__ = ["published_graphs", "stored_rows", "stored_weights"]

_OPSET = 20
LARGEST_CONSTANT = 1024
"""Bytes: constants are numbers and shapes, nothing of a weight's size."""


def published_graphs(family: Family, config: Any) -> dict[str, ir.Model]:
    """Every component in bfloat16, the decoder in one span.

    Raises:
        AssertionError: A graph holds values larger than a constant.
    """
    forms = FORMS[Dialect.PORTABLE]
    model = meta_model(config).to(TORCH_DTYPES[Precision.BF16])
    write_norms(model, forms)
    weights = _weights(model)
    decoder, dims = family.decoder(model), family.dims(config)

    def graph(name: str, build: Any, *arguments: Any) -> ir.Model:
        builder = GraphBuilder(name, precision=Precision.BF16, opset=_OPSET, weights=weights)
        with use_vision_forms(forms.vision):
            build(builder, *arguments)
        return builder.model()

    graphs = {"vision_encoder": graph("vision_encoder", build_vision, family.vision(model), dims)}
    if (video := family.video(model)) is not None:
        graphs["video_encoder"] = graph("video_encoder", build_vision, video, dims)
    graphs["embed_tokens"] = graph("embed_tokens", build_embed_tokens, decoder, dims)
    graphs["decoder_0"] = graph("decoder_0", build_span, decoder, dims, range(dims.layers), forms)
    for each in graphs.values():
        held = [v.const_value for v in each.graph.initializers.values()]
        constants = [value for value in held if not isinstance(value, ir.ExternalTensor)]
        assert max((value.nbytes for value in constants), default=0) < LARGEST_CONSTANT
        assert all(node.op_type != "Constant" for node in each.graph)
    return graphs


def stored_weights(graph: ir.Model) -> set[str]:
    """Names of the checkpoint's tensors that a graph reads."""
    values = graph.graph.initializers.items()
    stored = [name for name, value in values if isinstance(value.const_value, ir.ExternalTensor)]
    return {stored_rows(name)[0] for name in stored}


def stored_rows(name: str) -> tuple[str, slice]:
    """Of an initializer `<tensor>` or `<tensor>[<start>:<stop>]`: the checkpoint's tensor, and which rows."""
    tensor, _, rows = name.partition("[")
    return tensor, slice(*map(int, rows.rstrip("]").split(":"))) if rows else slice(None)


def _weights(model: Any) -> Weights:
    """Every parameter somewhere in one shard that does not exist."""
    names, tensors, offset = {}, {}, 0
    for name, parameter in model.named_parameters():
        length = 2 * math.prod(parameter.shape)
        names[id(parameter)] = name
        tensors[name] = TensorRef(name, Path("s"), offset, length, "bfloat16", tuple(parameter.shape))
        offset += length
    return Weights(names, tensors, lambda _: ("weights/s", Path()))

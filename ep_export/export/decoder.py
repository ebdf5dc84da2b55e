"""Embeddings, head and tail of the decoder: one traced layer, stamped once a layer.

    embed_tokens  input_ids [1,S] -> inputs_embeds [1,S,d]
    decoder_head  layers 0..K-1, then EntropyPrune: [1,S,d] -> hidden_states [1,M,d]
    decoder_tail  layers K..L-1, final norm, lm_head on the last position -> logits [1,1,V]

Caches have two lengths: P in the head, the kept length in the tail. Causality is by order, made inside from
lengths, so that kept tokens may keep their positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.export.prune_node import prune_function
from ep_export.export.stamp import GraphBuilder
from ep_export.export.trace import Part, Piece
from ep_export.families.base import DecoderModules
from ep_export.policy import Policy, Source

__all__ = [
    "DecoderPieces",
    "Names",
    "build_embed_tokens",
    "build_head",
    "build_tail",
    "decoder_parts",
    "name_weights",
    "weight_names",
]

_LENGTH, _PAST = 7, 5  # example lengths: two different primes, none of them a dimension that is special-cased
# Added to the score of a key that may not be seen: exp() of it is 0, and it is finite in float32 and bfloat16
# (float16 rounds it to -inf, where a row always has another key).
_UNSEEN = -1e30
_ATTENTION_OPSET = 23
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


Names = Mapping[int, Sequence[str]]
"""id of a parameter -> its names in the Hugging Face model that the checkpoint has."""


@dataclass(frozen=True)
class DecoderPieces:
    """What was traced of a decoder.

    Attributes:
        rotary: (hidden, position_ids) -> (cos, sin).
        layers: One piece a layer, shared by equal layers:
            (hidden, mask, cos, sin, past_key, past_value) -> (hidden, key, value, query states, key states,
            value states), the states before rotary embedding.
        final: hidden -> float32 logits of the last position.
        layer_weights: For every layer, parameter name in the piece -> in the Hugging Face model.
        final_weights: Likewise for `final`.
        embedding: Name of the embedding table in the Hugging Face model.
    """

    rotary: Piece
    layers: tuple[Piece, ...]
    final: Piece
    layer_weights: tuple[Mapping[str, str], ...]
    final_weights: Mapping[str, str]
    embedding: str


class _Cache:
    """The one method of a Hugging Face cache that a layer calls."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = key, value

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        return self.key, self.value


class _Layer(torch.nn.Module):
    """One decoder layer as a function of tensors; also returns the projections it computed on the way."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cache = _Cache(past_key, past_value)
        attention: Any = self.layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        states: list[torch.Tensor] = []
        hooks = [p.register_forward_hook(lambda _m, _i, output: states.append(output)) for p in projections]
        try:
            output = self.layer(
                hidden,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        output = output[0] if isinstance(output, tuple) else output
        return output, cache.key, cache.value, *states


class _Rotary(torch.nn.Module):
    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        axes = position_ids.shape[0]
        cos, sin = self.rotary(hidden, position_ids if axes > 1 else position_ids[0])
        return cos, sin


class _Final(torch.nn.Module):
    def __init__(self, norm: torch.nn.Module, lm_head: torch.nn.Module) -> None:
        super().__init__()
        self.norm, self.lm_head = norm, lm_head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.norm(hidden[:, -1:]))
        return logits.float()


def decoder_parts(
    modules: DecoderModules, dims: DecoderDims, *, dtype: torch.dtype, opset: int
) -> list[Part]:
    """What to trace: rotary tables, the end, and each distinct kind of layer once.

    Args:
        modules: The decoder's modules, parameters on `meta` in `dtype`.
        dims: Its dimensions.
        dtype: Type of hidden states and caches.
        opset: ONNX opset to write.

    Raises:
        UserError: The embedding is more than a table.
    """
    if type(modules.embed_tokens) is not torch.nn.Embedding:
        name = type(modules.embed_tokens).__name__
        raise UserError(f"embedding module {name} is not exported, expected a plain table")
    hidden = torch.empty(1, _LENGTH, dims.hidden_size, dtype=dtype, device="meta")
    positions = torch.empty(dims.position_axes, 1, _LENGTH, dtype=torch.int64, device="meta")
    table = torch.empty(1, _LENGTH, dims.head_dim, dtype=dtype, device="meta")
    # The Attention operator takes a mask of the query's type; portable softmax runs in float32.
    mask_dtype = dtype if opset >= _ATTENTION_OPSET else torch.float32
    mask = torch.empty(_LENGTH, _LENGTH + _PAST, dtype=mask_dtype, device="meta")
    past = torch.empty(1, dims.kv_heads, _PAST, dims.head_dim, dtype=dtype, device="meta")
    examples = (hidden, mask, table, table, past, past)
    kinds = {_kind(layer): layer for layer in reversed(modules.layers)}
    return [
        Part(_Rotary(modules.rotary), (hidden, positions), ([1], [2])),
        Part(_Final(modules.norm, modules.lm_head), (hidden,), ([1],)),
        *(Part(_Layer(layer), examples, ([1], [0, 1], [1], [1], [2], [2])) for layer in kinds.values()),
    ]


def name_weights(modules: DecoderModules, pieces: Sequence[Piece], names: Names) -> DecoderPieces:
    """Put the pieces of `decoder_parts` together with the parameters of every layer.

    Args:
        modules: As given to `decoder_parts`.
        pieces: What became of its parts.
        names: The checkpoint's names of parameters.
    """
    rotary, final, *layers = pieces
    end = _Final(modules.norm, modules.lm_head)
    kinds = dict(zip({_kind(layer): None for layer in reversed(modules.layers)}, layers, strict=True))
    return DecoderPieces(
        rotary=rotary,
        layers=tuple(kinds[_kind(layer)] for layer in modules.layers),
        final=final,
        layer_weights=tuple(weight_names(_Layer(layer), names) for layer in modules.layers),
        # Tied tables that the checkpoint stores twice are two tables: so transformers reads it.
        final_weights={name: names[id(p)][-1] for name, p in end.named_parameters()},
        embedding=names[id(modules.embed_tokens.weight)][0],
    )


def build_embed_tokens(builder: GraphBuilder, pieces: DecoderPieces, dims: DecoderDims) -> None:
    """input_ids [1,S] -> inputs_embeds [1,S,d]. Only the rows read are cast, not the table."""
    ids = builder.input("input_ids", _INT64, (1, "S"))
    rows = builder.op("Gather", [builder.weight(pieces.embedding, cast=False), ids], {"axis": 0})
    if builder.weight(pieces.embedding, cast=False).dtype != builder.dtype:
        rows = builder.op("Cast", [rows], {"to": int(builder.dtype)})
    builder.output(rows, "inputs_embeds", builder.dtype, (1, "S", dims.hidden_size))


def build_head(
    builder: GraphBuilder, pieces: DecoderPieces, dims: DecoderDims, policy: Policy, degree: int
) -> None:
    """Layers 0..K-1 and the EntropyPrune node."""
    embeds = builder.input("inputs_embeds", builder.dtype, (1, "S", dims.hidden_size))
    positions = builder.input("position_ids", _INT64, (dims.position_axes, 1, "S"))
    visual_index = builder.input("visual_index", _INT64, ("N",))
    keep_slots = builder.input("keep_slots", _INT64, ("k",))
    layers = range(policy.layer)
    hidden, presents, states = _layers(builder, pieces, dims, layers, embeds, positions)
    width = {
        Source.QUERY: (dims.heads, dims.head_dim),
        Source.KEY: (dims.kv_heads, dims.head_dim),
        Source.VALUE: (dims.kv_heads, dims.head_dim),
        Source.HIDDEN: (dims.heads, dims.hidden_size // dims.heads),
    }[policy.source]
    source = hidden if policy.source is Source.HIDDEN else states[_STATES.index(policy.source)]
    scored = builder.op("Reshape", [source, builder.constant([1, -1, *width])])
    function, attributes = prune_function(policy, heads=width[0], degree=degree, opset=_opset(builder))
    kept = builder.call(function, [scored, hidden, positions, visual_index, keep_slots], attributes)
    builder.output(kept[0], "hidden_states", builder.dtype, (1, "M", dims.hidden_size))
    builder.output(kept[1], "kept_position_ids", _INT64, (dims.position_axes, 1, "M"))
    builder.output(kept[2], "kept_index", _INT64, ("M",))
    _outputs(builder, dims, layers, presents, "P + S")


def build_tail(builder: GraphBuilder, pieces: DecoderPieces, dims: DecoderDims, policy: Policy) -> None:
    """Layers K..L-1, final norm and lm_head on the last position."""
    kept = builder.input("hidden_states", builder.dtype, (1, "M", dims.hidden_size))
    positions = builder.input("position_ids", _INT64, (dims.position_axes, 1, "M"))
    layers = range(policy.layer, dims.layers)
    hidden, presents, _ = _layers(builder, pieces, dims, layers, kept, positions)
    (logits,) = builder.stamp(pieces.final, [hidden], pieces.final_weights, "final")
    builder.output(logits, "logits", _FLOAT, (1, 1, dims.vocab_size))
    _outputs(builder, dims, layers, presents, "P + M")


_STATES = (Source.QUERY, Source.KEY, Source.VALUE)


def _layers(
    builder: GraphBuilder,
    pieces: DecoderPieces,
    dims: DecoderDims,
    layers: range,
    hidden: ir.Value,
    positions: ir.Value,
) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]], Sequence[ir.Value]]:
    """Stamp consecutive layers; returns hidden, every layer's (key, value), and the last layer's states."""
    cache = (1, dims.kv_heads, "P", dims.head_dim)
    pasts = [
        tuple(builder.input(f"past_key_values.{i}.{part}", builder.dtype, cache) for part in ("key", "value"))
        for i in layers
    ]
    mask = _causal_mask(builder, hidden, pasts[0][0])
    cos, sin = builder.stamp(pieces.rotary, [hidden, positions], {}, "rotary")
    presents: list[tuple[ir.Value, ir.Value]] = []
    states: Sequence[ir.Value] = ()
    for i, past in zip(layers, pasts, strict=True):
        inputs = [hidden, mask, cos, sin, *past]
        weights = pieces.layer_weights[i]
        hidden, key, value, *states = builder.stamp(pieces.layers[i], inputs, weights, f"layers.{i}")
        presents.append((key, value))
    return hidden, presents, states


def _outputs(
    builder: GraphBuilder,
    dims: DecoderDims,
    layers: range,
    presents: Sequence[tuple[ir.Value, ir.Value]],
    length: str,
) -> None:
    shape = (1, dims.kv_heads, length, dims.head_dim)
    for i, pair in zip(layers, presents, strict=True):
        for value, part in zip(pair, ("key", "value"), strict=True):
            builder.output(value, f"present.{i}.{part}", builder.dtype, shape)


def _causal_mask(builder: GraphBuilder, hidden: ir.Value, past: ir.Value) -> ir.Value:
    """[S, P + S], 0 where key j <= P + query i: by order, from lengths alone."""
    one, zero = builder.constant(1), builder.constant(0)
    length = builder.op("Squeeze", [builder.op("Shape", [hidden], {"start": 1, "end": 2})])
    before = builder.op("Squeeze", [builder.op("Shape", [past], {"start": 2, "end": 3})])
    total = builder.op("Add", [before, length])
    keys = builder.op("Range", [zero, total, one])
    queries = builder.op("Range", [before, total, one])
    rows = builder.op("Unsqueeze", [queries, builder.constant([1])])
    seen = builder.op("LessOrEqual", [keys, rows])
    dtype = builder.dtype if _opset(builder) >= _ATTENTION_OPSET else _FLOAT
    options = [builder.constant(0.0, np.float32), builder.constant(_UNSEEN, np.float32)]
    mask = builder.op("Where", [seen, *options])
    return mask if dtype == _FLOAT else builder.op("Cast", [mask], {"to": int(dtype)})


def _opset(builder: GraphBuilder) -> int:
    return builder.graph.opset_imports[""]


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What must be equal for two layers to share a trace."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    attention: Any = layer.self_attn
    return (
        type(layer),
        shapes,
        getattr(attention, "layer_type", None),
        getattr(attention, "sliding_window", None),
    )


def weight_names(module: torch.nn.Module, names: Names) -> dict[str, str]:
    """Parameter name in a module -> in the Hugging Face model."""
    return {name: names[id(parameter)][0] for name, parameter in module.named_parameters()}

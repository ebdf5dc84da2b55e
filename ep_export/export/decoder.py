"""Embeddings and spans of the decoder.

    embed_tokens  input_ids [B,S] -> inputs_embeds [B,S,d]
    decoder_<i>   layers between two cuts: inputs_embeds [B,T,d] -> hidden_states [B,T,d] and the projections
                  of its last layer, which a chooser may score, and what its last position attends to where
                  a chooser does; the last span: -> logits [B,1,V]

A span knows nothing of pruning. Causality is by order, made inside from lengths, so that kept tokens may keep
their positions and every span a cache length of its own. Caches grow by concatenation, B = 1; or they have a
capacity C, into which new rows are written at `write_index` [B]: what lies behind them is not seen. Inside,
hidden states are rows [B T,d]: linear layers then need no reshapes.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.export.dialects import Forms
from ep_export.export.graph_builder import GraphBuilder, Tensor
from ep_export.export.recording import Size, Spec, Varying, onnx_operator
from ep_export.export.tracing import trace
from ep_export.families.base import DecoderModules

__all__ = [
    "STATES",
    "Rotary",
    "build_embed_tokens",
    "build_span",
    "check_decoder",
    "last_attention",
]

STATES = ("query_states", "key_states", "value_states", "attention_states")
"""What a span gives out of its last layer, so that a chooser may score it; the last only where one does."""

# B, T, P and C while recording: primes, none of them special
_BATCH, _LENGTH, _PAST, _CAPACITY = Varying(2, 3), Varying(7, 11), Varying(5, 13), Varying(17, 23)
# Added to the score of a key that may not be seen: exp() of it is 0, and it is finite in float32 and bfloat16
# (float16 rounds it to -inf, where a row always has another key).
_UNSEEN = -1e30
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


class Rotary(torch.nn.Module):
    """Rotary tables as a dialect has them, from the model's own module.

    Args:
        rotary: The module.
        forms: Of the dialect.
    """

    def __init__(self, rotary: torch.nn.Module, forms: Forms) -> None:
        super().__init__()
        self.rotary, self.forms = rotary, forms

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, d] (its type counts) and positions [A, B, T] -> cos and sin."""
        cos, sin = self.rotary(hidden, positions if positions.shape[0] > 1 else positions[0])
        return self.forms.tables(cos, sin)


class _Layer(torch.nn.Module):
    """A decoder layer of the Llama kind over rows, with the projections it computes on the way.

    Args:
        layer: Hugging Face's.
        dims: The decoder's dimensions.
        forms: Of the dialect.
        attention: Whether it gives out what the last position attends to.
    """

    def __init__(self, layer: Any, dims: DecoderDims, forms: Forms, *, attention: bool) -> None:
        super().__init__()
        self.layer, self.forms, self.attention = layer, forms, attention
        self.heads = (dims.heads, dims.kv_heads, dims.kv_heads)
        self.head_dim = dims.head_dim

    def forward(
        self,
        rows: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        *write_index: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """One layer.

        Args:
            rows: [B T, d].
            mask: [T, P + T], added to the scores; of caches of fixed capacity [B, 1, T, C].
            cos: Rotary tables as the dialect has them.
            sin: Likewise.
            past_key: [1, KVH, P, D], or [B, KVH, C, D].
            past_value: Likewise.
            write_index: Of caches of fixed capacity: [B] int64, where new rows go.

        Returns:
            Rows [B T, d]; key and value [1, KVH, P + T, D], or [B, KVH, C, D]; query, key and value states
            before rotary embedding [B, T, heads, D]; `last_attention` if it gives that out.
        """
        layer, forms = self.layer, self.forms
        own = layer.self_attn
        normed = layer.input_layernorm(rows)
        states = [
            projection(normed).reshape(cos.shape[0], -1, heads, self.head_dim)
            for projection, heads in zip((own.q_proj, own.k_proj, own.v_proj), self.heads, strict=True)
        ]
        query, key, value = (x.transpose(1, 2) for x in states)
        query, key = forms.rotate(query, cos, sin), forms.rotate(key, cos, sin)
        if self.attention:
            states.append(last_attention(query[:, :, -1:], key, own.scaling))
        key, value = _extended(past_key, key, *write_index), _extended(past_value, value, *write_index)
        attended = forms.attention(query, key, value, mask, own.scaling)
        rows = rows + own.o_proj(attended.transpose(1, 2).reshape(rows.shape[0], -1))
        return rows + layer.mlp(layer.post_attention_layernorm(rows)), key, value, *states


class _Final(torch.nn.Module):
    def __init__(self, modules: DecoderModules) -> None:
        super().__init__()
        self.norm, self.lm_head = modules.norm, modules.lm_head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.norm(hidden[:, -1:]))
        return logits.float()


def last_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What the last position attends to, as multiples of an even share: `LayerStates.attention` of a batch.

    Args:
        query: [B, H, 1, D], the last position's, after rotary embedding.
        key: [B, KVH, T, D], likewise; of the new positions alone, which in a prefill are all there are.
        scale: Factor on the scores.

    Returns:
        [B, T, 1, 1] float32 in every graph: shares of long prompts are below what float16 holds.
    """
    batch, heads, _, width = query.shape
    kv_heads = key.shape[1]
    grouped = (query.float() * scale).reshape(batch, kv_heads, heads // kv_heads, width)
    scores = torch.matmul(grouped, key.float().transpose(2, 3))
    received = torch.softmax(scores, dim=-1).mean((1, 2))
    return (received / received.mean(-1, keepdim=True))[..., None, None]


def _extended(cache: torch.Tensor, new: torch.Tensor, *write_index: torch.Tensor) -> torch.Tensor:
    if write_index:
        return onnx_operator("TensorScatter", [cache, new, *write_index], {"axis": 2})
    return torch.cat([cache, new], 2)


def check_decoder(modules: DecoderModules) -> None:
    """Refuse what `_Layer` and `build_embed_tokens` would not compute.

    Raises:
        UserError: The embedding is more than a table, or a layer has other parts.
    """
    if type(modules.embed_tokens) is not torch.nn.Embedding:
        name = type(modules.embed_tokens).__name__
        raise UserError(f"embedding module {name} is not exported, expected a plain table")
    for layer in modules.layers:
        parts = {name for name, _ in layer.named_children()}
        own = {name for name, _ in layer.self_attn.named_children() if name != "rotary_emb"}  # type: ignore[union-attr]
        if parts != _LAYER or own != _ATTENTION:
            other = sorted((parts ^ _LAYER) | (own ^ _ATTENTION))[0]
            raise UserError(
                f"decoder layer {type(layer).__name__} differs from Llama's in {other}",
                hint="such models are not exported",
            )


def build_embed_tokens(
    graph: GraphBuilder, modules: DecoderModules, dims: DecoderDims, *, batch: int | str = 1
) -> None:
    """input_ids [B,S] -> inputs_embeds [B,S,d]. Only the rows read are cast, not the table."""
    ids = graph.input("input_ids", (batch, "S"), Spec((1, _LENGTH), torch.int64))
    table = graph.stored(modules.embed_tokens.weight)  # type: ignore[arg-type]
    shape: tuple[Size, ...] = (1, _LENGTH, dims.hidden_size)
    rows = graph.tensor("Gather", [table, ids], Spec(shape, table.spec.dtype), axis=0)
    graph.output(graph.cast(rows, graph.dtype), "inputs_embeds", (batch, "S", dims.hidden_size))


def build_span(
    graph: GraphBuilder,
    modules: DecoderModules,
    dims: DecoderDims,
    layers: range,
    forms: Forms,
    *,
    attention: bool = False,
    fixed_caches: bool = False,
) -> None:
    """Consecutive layers; after the last of all also the final norm and lm_head on the last position.

    `attention` adds the output of that name, which a chooser scores at the cut behind these layers.
    """
    width, axes = dims.hidden_size, dims.position_axes
    batch, size, rows_after = ("B", _BATCH, "C") if fixed_caches else (1, 1, "P + T")
    embeds = graph.input("inputs_embeds", (batch, "T", width), Spec((size, _LENGTH, width), graph.dtype))
    positions = graph.input("position_ids", (axes, batch, "T"), Spec((axes, size, _LENGTH), torch.int64))
    write_index = [graph.input("write_index", (batch,), Spec((size,), torch.int64))] if fixed_caches else []
    pasts = [_past(graph, dims, i, fixed_caches=fixed_caches) for i in layers]
    mask = _causal_mask(graph, embeds, pasts[0][0], forms, *write_index)
    tables = trace(graph, Rotary(modules.rotary, forms), [embeds, positions], "rotary")
    rows = graph.rows(embeds)
    presents, states = [], []
    for i, past in zip(layers, pasts, strict=True):
        layer = _Layer(modules.layers[i], dims, forms, attention=attention and i == layers[-1])
        given = [rows, mask, *tables, *past, *write_index]
        rows, key, value, *states = trace(graph, layer, given, f"layers.{i}")
        presents.append((key, value))
    if layers.stop == dims.layers:
        with graph.scope("final"):
            hidden = graph.view(rows, (size, _LENGTH, width))
        (logits,) = trace(graph, _Final(modules), [hidden], "final")
        graph.output(logits, "logits", (batch, 1, dims.vocab_size))
    else:
        graph.output(graph.view(rows, (size, _LENGTH, width)), "hidden_states", (batch, "T", width))
        for tensor, name in zip(states, STATES, strict=False):
            _, _, *heads = tensor.spec.shape
            graph.output(tensor, name, (batch, "T", *heads))  # type: ignore[arg-type]
    for i, present in zip(layers, presents, strict=True):
        for tensor, part in zip(present, ("key", "value"), strict=True):
            graph.output(tensor, f"present.{i}.{part}", (batch, dims.kv_heads, rows_after, dims.head_dim))


def _past(graph: GraphBuilder, dims: DecoderDims, layer: int, *, fixed_caches: bool) -> list[Tensor]:
    batch, rows = (_BATCH, _CAPACITY) if fixed_caches else (1, _PAST)
    spec = Spec((batch, dims.kv_heads, rows, dims.head_dim), graph.dtype)
    symbols = ("B" if fixed_caches else 1, dims.kv_heads, "C" if fixed_caches else "P", dims.head_dim)
    return [graph.input(f"past_key_values.{layer}.{part}", symbols, spec) for part in ("key", "value")]


def _causal_mask(
    graph: GraphBuilder, hidden: Tensor, past: Tensor, forms: Forms, *write_index: Tensor
) -> Tensor:
    """Added to scores: by order, from lengths alone.

    [T, P + T], 0 where key j <= P + query i; of caches of fixed capacity [B, 1, T, C], 0 where key j <=
    write_index + query i.
    """
    one, zero = graph.whole(1), graph.whole(0)
    if write_index:
        keys = graph.indices(graph.length(past.value, 2))
        new = graph.op("Unsqueeze", graph.indices(graph.length(hidden.value, 1)), graph.ints(1))
        queries = graph.op("Add", new, graph.op("Unsqueeze", write_index[0].value, graph.ints(1, 2, 3)))
        spec = Spec((_BATCH, 1, _LENGTH, _CAPACITY), torch.float32)
        return _added(graph, graph.op("LessOrEqual", keys, queries), spec, forms)
    length = graph.op("Squeeze", graph.length(hidden.value, 1))
    before = graph.op("Squeeze", graph.length(past.value, 2))
    total = graph.op("Add", before, length)
    keys = graph.op("Range", zero, total, one)
    queries = graph.op("Unsqueeze", graph.op("Range", before, total, one), graph.ints(1))
    seen = graph.op("LessOrEqual", keys, queries)
    total_size = Varying(_LENGTH.small + _PAST.small, _LENGTH.large + _PAST.large)
    spec = Spec((_LENGTH, total_size), torch.float32)
    return _added(graph, seen, spec, forms)


def _added(graph: GraphBuilder, seen: ir.Value, spec: Spec, forms: Forms) -> Tensor:
    mask = graph.tensor("Where", [seen, graph.number(0.0), graph.number(_UNSEEN)], spec)
    return graph.cast(mask, forms.mask_dtype(graph.dtype))

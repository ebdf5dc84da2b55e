"""Embeddings and spans of the decoder.

    embed_tokens  input_ids [1,S] -> inputs_embeds [1,S,d]
    decoder_<i>   layers between two cuts: inputs_embeds [1,T,d] -> hidden_states [1,T,d] and the projections
                  of its last layer, which a chooser may score; the last span: -> logits [1,1,V]

A span knows nothing of pruning. Causality is by order, made inside from lengths, so that kept tokens may keep
their positions and every span a cache length of its own. Inside, hidden states are rows [T,d]: linear layers
then need no reshapes.
"""

from __future__ import annotations

from typing import Any

import torch

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.export.dialects import Forms
from ep_export.export.graph_builder import GraphBuilder, Tensor
from ep_export.export.recording import Size, Spec, Varying
from ep_export.export.tracing import trace
from ep_export.families.base import DecoderModules

__all__ = ["STATES", "Rotary", "build_embed_tokens", "build_span", "check_decoder"]

STATES = ("query_states", "key_states", "value_states")

_LENGTH, _PAST = Varying(7, 11), Varying(5, 13)  # T and P while recording: primes, none of them special
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
    """A decoder layer of the Llama kind over rows, with the projections it computes on the way."""

    def __init__(self, layer: Any, dims: DecoderDims, forms: Forms) -> None:
        super().__init__()
        self.layer, self.forms = layer, forms
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
    ) -> tuple[torch.Tensor, ...]:
        """One layer.

        Args:
            rows: [T, d].
            mask: [T, P + T], added to the scores.
            cos: Rotary tables as the dialect has them.
            sin: Likewise.
            past_key: [1, KVH, P, D].
            past_value: [1, KVH, P, D].

        Returns:
            Rows [T, d]; key and value [1, KVH, P + T, D]; query, key and value states before rotary embedding
            [1, T, heads, D].
        """
        layer, forms = self.layer, self.forms
        own = layer.self_attn
        normed = layer.input_layernorm(rows)
        states = [
            projection(normed).reshape(1, -1, heads, self.head_dim)
            for projection, heads in zip((own.q_proj, own.k_proj, own.v_proj), self.heads, strict=True)
        ]
        query, key, value = (x.transpose(1, 2) for x in states)
        query, key = forms.rotate(query, cos, sin), forms.rotate(key, cos, sin)
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        attended = forms.attention(query, key, value, mask, own.scaling)
        rows = rows + own.o_proj(attended.transpose(1, 2).reshape(rows.shape[0], -1))
        return rows + layer.mlp(layer.post_attention_layernorm(rows)), key, value, *states


class _Final(torch.nn.Module):
    def __init__(self, modules: DecoderModules) -> None:
        super().__init__()
        self.norm, self.lm_head = modules.norm, modules.lm_head

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.norm(rows[-1:]))
        return logits.float().unsqueeze(0)


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
    graph: GraphBuilder, modules: DecoderModules, dims: DecoderDims, layers: range, forms: Forms
) -> None:
    """Consecutive layers; after the last of all also the final norm and lm_head on the last position."""
    width, axes = dims.hidden_size, dims.position_axes
    embeds = graph.input("inputs_embeds", (1, "T", width), Spec((1, _LENGTH, width), graph.dtype))
    positions = graph.input("position_ids", (axes, 1, "T"), Spec((axes, 1, _LENGTH), torch.int64))
    pasts = [_past(graph, dims, i) for i in layers]
    mask = _causal_mask(graph, embeds, pasts[0][0], forms)
    tables = trace(graph, Rotary(modules.rotary, forms), [embeds, positions], "rotary")
    rows = graph.rows(embeds)
    presents, states = [], []
    for i, past in zip(layers, pasts, strict=True):
        layer = _Layer(modules.layers[i], dims, forms)
        rows, key, value, *states = trace(graph, layer, [rows, mask, *tables, *past], f"layers.{i}")
        presents.append((key, value))
    if layers.stop == dims.layers:
        (logits,) = trace(graph, _Final(modules), [rows], "final")
        graph.output(logits, "logits", (1, 1, dims.vocab_size))
    else:
        graph.output(graph.view(rows, (1, _LENGTH, width)), "hidden_states", (1, "T", width))
        for tensor, name in zip(states, STATES, strict=True):
            _, _, *heads = tensor.spec.shape
            graph.output(tensor, name, (1, "T", *heads))  # type: ignore[arg-type]
    for i, present in zip(layers, presents, strict=True):
        for tensor, part in zip(present, ("key", "value"), strict=True):
            graph.output(tensor, f"present.{i}.{part}", (1, dims.kv_heads, "P + T", dims.head_dim))


def _past(graph: GraphBuilder, dims: DecoderDims, layer: int) -> list[Tensor]:
    spec = Spec((1, dims.kv_heads, _PAST, dims.head_dim), graph.dtype)
    symbols = (1, dims.kv_heads, "P", dims.head_dim)
    return [graph.input(f"past_key_values.{layer}.{part}", symbols, spec) for part in ("key", "value")]


def _causal_mask(graph: GraphBuilder, hidden: Tensor, past: Tensor, forms: Forms) -> Tensor:
    """[T, P + T], 0 where key j <= P + query i: by order, from lengths alone."""
    one, zero = graph.whole(1), graph.whole(0)
    length = graph.op("Squeeze", graph.length(hidden.value, 1))
    before = graph.op("Squeeze", graph.length(past.value, 2))
    total = graph.op("Add", before, length)
    keys = graph.op("Range", zero, total, one)
    queries = graph.op("Unsqueeze", graph.op("Range", before, total, one), graph.ints(1))
    seen = graph.op("LessOrEqual", keys, queries)
    total_size = Varying(_LENGTH.small + _PAST.small, _LENGTH.large + _PAST.large)
    spec = Spec((_LENGTH, total_size), torch.float32)
    mask = graph.tensor("Where", [seen, graph.number(0.0), graph.number(_UNSEEN)], spec)
    return graph.cast(mask, forms.mask_dtype(graph.dtype))

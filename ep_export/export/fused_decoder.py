"""Spans of the decoder in ONNX Runtime's own operators: fewest nodes, a batch, caches written in place.

    decoder_<i>   inputs_embeds [B,T,d], position_ids [A,B,T], caches [B,KVH,C,D], seqlens_k [B],
                  total_sequence_length [1] -> as in `decoder`, with B

GroupQueryAttention appends to caches of capacity C in place where output and input are the same memory,
and masks by lengths; where C is too small it gives larger ones. Rotary embedding stays outside of it: its
tables are of positions 0, 1, ..., which mRoPE and kept positions are not. Rows keep their axes [B,T], so that
nothing is reshaped; a residual sum is formed in the norm that follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ep_export.dims import DecoderDims
from ep_export.export.decoder import STATES, Rotary, last_attention
from ep_export.export.dialects import Forms
from ep_export.export.graph_builder import GraphBuilder, PackedWeight, Tensor
from ep_export.export.operators import OPERATORS, Operator, packed_linear
from ep_export.export.recording import Spec, Varying, onnx_operator, onnx_operators
from ep_export.export.tracing import trace
from ep_export.families.base import DecoderModules

__all__ = ["build_fused_span"]

_DOMAIN = "com.microsoft"
_BATCH, _LENGTH, _CAPACITY = Varying(2, 3), Varying(7, 11), Varying(17, 23)  # while recording


def _linear(graph: GraphBuilder, given: Mapping[str, Any], result: Spec) -> Tensor:
    """A weight is read where it lies, as by Gemm, and rows may have several axes."""
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if isinstance(weight, PackedWeight):
        return packed_linear(graph, x, weight, bias)
    out = graph.tensor("FusedMatMul", [x, weight], result, domain=_DOMAIN, transB=1)
    return out if bias is None else graph.tensor("Add", [out, bias], result)


_OPERATORS: Mapping[str, Operator] = {**OPERATORS, "linear": _linear}


class _Layer(torch.nn.Module):
    """A decoder layer of the Llama kind, with the projections it computes on the way.

    Args:
        layer: Hugging Face's.
        dims: The decoder's dimensions.
        attention: Whether it gives out what the last position attends to.
    """

    def __init__(self, layer: Any, dims: DecoderDims, *, attention: bool) -> None:
        super().__init__()
        self.layer, self.dims, self.attention = layer, dims, attention

    def forward(
        self,
        hidden: torch.Tensor,
        added: torch.Tensor | None,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """One layer.

        Args:
            hidden: [B, T, d].
            added: [B, T, d], what the layer before adds to it; None for the first.
            seqlens_k: [B] int32, the last key each query sees.
            total_sequence_length: [1] int32, the longest of the batch.
            cos: [B, T, D/2].
            sin: Likewise.
            past_key: [B, KVH, C, D].
            past_value: Likewise.

        Returns:
            Hidden states and what is to be added to them; key and value caches; query, key and value states
            before rotary embedding [B, T, heads * D]; `last_attention` if it gives that out.
        """
        own, dims = self.layer.self_attn, self.dims
        normed, hidden = _norm(self.layer.input_layernorm, hidden, added)
        states = [own.q_proj(normed), own.k_proj(normed), own.v_proj(normed)]
        query, key = (
            onnx_operator("RotaryEmbedding", [x, cos, sin], {"interleaved": 0, "num_heads": heads})
            for x, heads in zip(states, (dims.heads, dims.kv_heads), strict=False)
        )
        attended, present_key, present_value = onnx_operators(
            "GroupQueryAttention",
            [query, key, states[2], past_key, past_value, seqlens_k, total_sequence_length],
            {"num_heads": dims.heads, "kv_num_heads": dims.kv_heads, "scale": own.scaling},
            like=[query, past_key, past_value],
            domain=_DOMAIN,
        )
        if self.attention:
            rotated = query[:, -1:], key
            last, keys = (x.reshape(*x.shape[:2], -1, dims.head_dim).transpose(1, 2) for x in rotated)
            states.append(last_attention(last, keys, own.scaling))
        normed, hidden = _norm(self.layer.post_attention_layernorm, hidden, own.o_proj(attended))
        return hidden, self.layer.mlp(normed), present_key, present_value, *states


class _Final(torch.nn.Module):
    def __init__(self, modules: DecoderModules) -> None:
        super().__init__()
        self.norm, self.lm_head = modules.norm, modules.lm_head

    def forward(self, hidden: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        normed, _ = _norm(self.norm, hidden[:, -1:], added[:, -1:])
        logits: torch.Tensor = self.lm_head(normed)
        return logits.float()


def _norm(norm: Any, hidden: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The RMS norm of a sum, and the sum."""
    epsilon = norm.variance_epsilon
    if added is None:
        attributes = {"axis": -1, "epsilon": epsilon}
        return onnx_operator("RMSNormalization", [hidden, norm.weight], attributes), hidden
    one = hidden[..., :1]  # mean and deviation, which nobody reads
    normed, _, _, total = onnx_operators(
        "SkipSimplifiedLayerNormalization",
        [hidden, added, norm.weight],
        {"epsilon": epsilon},
        like=[hidden, one, one, hidden],
        domain=_DOMAIN,
    )
    return normed, total


def build_fused_span(
    graph: GraphBuilder,
    modules: DecoderModules,
    dims: DecoderDims,
    layers: range,
    forms: Forms,
    *,
    attention: bool = False,
) -> None:
    """Consecutive layers; see `build_span`."""
    width, axes = dims.hidden_size, dims.position_axes
    hidden = graph.input("inputs_embeds", ("B", "T", width), Spec((_BATCH, _LENGTH, width), graph.dtype))
    positions = graph.input("position_ids", (axes, "B", "T"), Spec((axes, _BATCH, _LENGTH), torch.int64))
    lengths = [
        graph.input("seqlens_k", ("B",), Spec((_BATCH,), torch.int32)),
        graph.input("total_sequence_length", (1,), Spec((1,), torch.int32)),
    ]
    pasts = [_past(graph, dims, i) for i in layers]
    tables = trace(graph, Rotary(modules.rotary, forms), [hidden, positions], "rotary")
    added: list[Tensor] = []
    presents: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []
    for i, past in zip(layers, pasts, strict=True):
        layer = _Layer(modules.layers[i], dims, attention=attention and i == layers[-1])
        hidden, last, key, value, *states = trace(
            graph,
            layer if added else lambda x, *rest, layer=layer: layer(x, None, *rest),
            [hidden, *added, *lengths, *tables, *past],
            f"layers.{i}",
            operators=_OPERATORS,
        )
        added = [last]
        presents.append((key, value))
    if layers.stop == dims.layers:
        (logits,) = trace(graph, _Final(modules), [hidden, *added], "final", operators=_OPERATORS)
        graph.output(logits, "logits", ("B", 1, dims.vocab_size))
    else:
        with graph.scope(f"layers.{layers.stop - 1}"):
            total = graph.tensor("Add", [hidden, *added], hidden.spec)
        graph.output(total, "hidden_states", ("B", "T", width))
        projected = ((heads, dims.head_dim) for heads in (dims.heads, dims.kv_heads, dims.kv_heads))
        for tensor, name, shape in zip(states, STATES, (*projected, (1, 1)), strict=False):
            graph.output(graph.view(tensor, (_BATCH, _LENGTH, *shape)), name, ("B", "T", *shape))
    for i, present in zip(layers, presents, strict=True):
        for tensor, part in zip(present, ("key", "value"), strict=True):
            graph.output(tensor, f"present.{i}.{part}", ("B", dims.kv_heads, "C'", dims.head_dim))


def _past(graph: GraphBuilder, dims: DecoderDims, layer: int) -> list[Tensor]:
    spec = Spec((_BATCH, dims.kv_heads, _CAPACITY, dims.head_dim), graph.dtype)
    symbols = ("B", dims.kv_heads, "C", dims.head_dim)
    return [graph.input(f"past_key_values.{layer}.{part}", symbols, spec) for part in ("key", "value")]

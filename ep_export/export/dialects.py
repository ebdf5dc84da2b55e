"""The two operator dialects: how attention, norms and rotary embedding are written while tracing.

Portable (opset 20) is what Hugging Face computes, in MatMul, Softmax and elementwise operators. Modern (opset
23) emits Attention, RMSNormalization and RotaryEmbedding. Both are patches on the Hugging Face modules that
last as long as the trace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from ep_export.bundle import Dialect
from ep_export.families.attention import attention, use_attention

__all__ = ["OPSETS", "grouped_attention", "onnx_attention", "tracing"]

OPSETS = {Dialect.PORTABLE: 20, Dialect.MODERN: 23}

_IMPLEMENTATION = "ep_export"
_CONFIG_FIELD = "_attn_implementation_internal"
_ROTARY = "apply_rotary_pos_emb"
_FLOAT32 = 1  # onnx.TensorProto.FLOAT


@contextmanager
def tracing(dialect: Dialect, model: torch.nn.Module) -> Iterator[None]:
    """Within the block, the modules of a Hugging Face model trace into the dialect's operators."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _hugging_face_attention)
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(getattr(m, "config", None), _CONFIG_FIELD)}
    with ExitStack() as stack:
        for config in configs.values():
            stack.enter_context(mock.patch.object(config, _CONFIG_FIELD, _IMPLEMENTATION))
        if dialect is Dialect.PORTABLE:
            stack.enter_context(use_attention(grouped_attention))
        else:
            stack.enter_context(use_attention(onnx_attention))
            _patch_modern(stack, modules)
        yield


def _patch_modern(stack: ExitStack, modules: Sequence[torch.nn.Module]) -> None:
    for kind in {type(module) for module in modules}:
        if kind.__name__.endswith("RMSNorm"):
            stack.enter_context(mock.patch.object(kind, "forward", _onnx_rms_norm))
        source = sys.modules[kind.__module__]
        if hasattr(source, _ROTARY):
            stack.enter_context(mock.patch.object(source, _ROTARY, _onnx_rotary))


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Portable attention; see `ep_export.families.attention.Attention`.

    The query heads that share a key head become rows of one product, so that a decode step reads the cache
    once a key head instead of once a query head, and nothing is repeated. Softmax is in float32, as Hugging
    Face has it.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # The query is scaled before the product: it is the smaller tensor, and in float16 it keeps large products
    # below the overflow at 65504.
    query = (query * scale).reshape(batch, kv_heads, groups * length, width)
    scores = torch.matmul(query, key.transpose(2, 3)).float()
    if mask is not None and groups > 1:
        if batch != 1:
            raise NotImplementedError("a mask with grouped heads needs batch 1")
        split = (kv_heads, groups, length, key.shape[2])
        scores = (scores.reshape(split) + mask).reshape(scores.shape)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.matmul(weights, value).reshape(batch, heads, length, width)


def onnx_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The Attention operator of opset 23; see `ep_export.families.attention.Attention`.

    Without `softmax_precision`: TensorRT refuses the attribute (1.7 of TensorRT for RTX) and chooses itself.
    """
    inputs = [query, key, value] if mask is None else [query, key, value, mask.to(query.dtype)]
    return _emit("Attention", inputs, {"scale": scale})


def _onnx_rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    attributes = {"axis": -1, "epsilon": self.variance_epsilon, "stash_type": _FLOAT32}
    return _emit("RMSNormalization", (hidden_states, self.weight), attributes)


def _onnx_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """RotaryEmbedding reads half tables: Hugging Face's repeat themselves over the second half."""
    if unsqueeze_dim != 1:
        raise NotImplementedError("rotary embedding expects [batch, heads, length, head_dim]")
    half = cos.shape[-1] // 2
    tables = (cos[..., :half], sin[..., :half])

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return _emit("RotaryEmbedding", (x, *tables), {"interleaved": 0})

    return rotate(q), rotate(k)


def _emit(op_type: str, inputs: Sequence[torch.Tensor], attributes: dict[str, Any]) -> torch.Tensor:
    """An operator of opset 23 whose output has the type and shape of its first input."""
    first = inputs[0]
    symbol = torch.onnx.ops.symbolic(
        op_type, inputs, attributes, dtype=first.dtype, shape=first.shape, version=OPSETS[Dialect.MODERN]
    )
    return symbol.to(first.device)  # torch 2.13 places it on the CPU whatever its inputs


def _hugging_face_attention(
    module: torch.nn.Module,  # noqa: ARG001 - transformers' interface
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface -> the attention in use."""
    return attention(query, key, value, attention_mask, scaling).transpose(1, 2), None

"""The operator dialects: how attention, norms and rotary embedding are written.

Portable (opset 20) is what Hugging Face computes, in MatMul, Softmax and elementwise operators. Modern (opset
24) has Attention, RMSNormalization, RotaryEmbedding, and TensorScatter for caches of fixed capacity. For ONNX
Runtime spans have a builder of their own, `fused_decoder`; its encoders differ from portable ones where ONNX
Runtime has more than it fuses by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ep_export.bundle import Dialect
from ep_export.export.recording import onnx_operator, onnx_operators
from ep_export.families.attention import (
    PORTABLE_VISION,
    Attention,
    VisionForms,
    over_heads,
    portable_attention,
    portable_rotate,
)

__all__ = ["FORMS", "Forms", "write_norms"]

_FLOAT32 = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Forms:
    """What a dialect writes its own way.

    Attributes:
        attention: See `ep_export.families.attention.Attention`.
        rms_norm: (x, weight, epsilon) -> x normalised over its last axis, in float32, times the weight.
        tables: (cos, sin) [1, T, D] as Hugging Face has them, both halves equal -> what `rotate` reads.
        rotate: (x [1, H, T, D], tables) -> x with rotary embedding.
        mask_dtype: Graph's type -> type of attention masks.
        vision: Attention and rotary embedding of vision blocks.
    """

    attention: Attention
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    tables: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    mask_dtype: Callable[[torch.dtype], torch.dtype]
    vision: VisionForms


def write_norms(model: torch.nn.Module, forms: Forms) -> None:
    """Give every RMS norm of a model the dialect's form; the model is the caller's own."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module, forms)


def _norm(module: Any, forms: Forms, hidden_states: torch.Tensor) -> torch.Tensor:
    return forms.rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _portable_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """With a quotient, not a product with the reciprocal: ONNX Runtime fuses this form into one kernel."""
    wide = x.float()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
    return normed.to(x.dtype) * weight


def _portable_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, 1, T, D]; the minus of the rotation is in the table, once a span instead of twice a layer."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(1), torch.cat([-first, second], dim=-1).unsqueeze(1)


def _onnx_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Without `softmax_precision`: TensorRT refuses the attribute (1.7 of TensorRT for RTX), and chooses."""
    inputs = [query, key, value] if mask is None else [query, key, value, mask.to(query.dtype)]
    return onnx_operator("Attention", inputs, {"scale": scale})


def _onnx_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": _FLOAT32}
    return onnx_operator("RMSNormalization", [x, weight], attributes)


def _onnx_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, T, D/2]: RotaryEmbedding reads half tables."""
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def _onnx_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return onnx_operator("RotaryEmbedding", [x, cos, sin], {"interleaved": 0})


def _fused_vision_tables(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return angles.cos(), angles.sin()


def _fused_vision_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    return onnx_operator("RotaryEmbedding", [x, cos, sin], {"interleaved": 0, "num_heads": heads})


def _fused_vision_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    *,
    heads: int,
) -> torch.Tensor:
    """MultiHeadAttention never holds all scores, but with a mask; Attention is faster at those of windows."""
    if mask is not None:
        inputs = [query, key, value, mask.to(query.dtype)]
        return onnx_operator(
            "Attention", inputs, {"scale": scale, "q_num_heads": heads, "kv_num_heads": heads}
        )
    (attended,) = onnx_operators(
        "MultiHeadAttention",
        [query, key, value],
        {"num_heads": heads, "scale": scale},
        like=[query],
        domain="com.microsoft",
    )
    return attended


FORMS: Mapping[Dialect, Forms] = {
    Dialect.PORTABLE: Forms(
        portable_attention,
        _portable_rms_norm,
        _portable_tables,
        portable_rotate,
        lambda _: torch.float32,  # its softmax is in float32
        PORTABLE_VISION,
    ),
    Dialect.MODERN: Forms(
        _onnx_attention,
        _onnx_rms_norm,
        _onnx_tables,
        _onnx_rotate,
        lambda dtype: dtype,  # Attention takes a mask of the query's type
        replace(PORTABLE_VISION, attention=over_heads(_onnx_attention)),
    ),
    Dialect.ONNXRUNTIME: Forms(
        portable_attention,
        _portable_rms_norm,
        _onnx_tables,
        _onnx_rotate,
        lambda _: torch.float32,
        VisionForms(_fused_vision_attention, _fused_vision_tables, _fused_vision_rotate),
    ),
}

"""What writes a tiny checkpoint of every family, and which precision goes with which dialect."""

from __future__ import annotations

from typing import Any

from tiny_families import makers

from ep_export.bundle import Dialect, Precision

__all__ = ["MAKERS", "PRECISIONS"]

# Two layers of 8 heads: for entropies of 4, TensorRT-RTX 1.7 puts 150 MB of float32 kernels into the prune
# component's engine and takes half a minute to make them; of 8, 4 MB and a second.
_TEXT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_QWEN: dict[str, Any] = {"layers": 2, "heads": 8, "kv_heads": 4, "vision_depth": 2}

MAKERS = {name: maker for name, maker in makers(_QWEN, _TEXT).items() if name != "idefics3"}
"""Family -> what writes a tiny checkpoint of it."""

# TensorRT-RTX has no float32 Attention, and needs none: dialect and precision go together.
PRECISIONS = {Dialect.PORTABLE: Precision.FP32, Dialect.MODERN: Precision.BF16}

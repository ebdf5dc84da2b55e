"""What writes a tiny checkpoint of every family, and which precision goes with which dialect."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tiny import make_tiny
from tiny_llava import make_tiny_llava, make_tiny_llava_next
from tiny_llava_onevision import make_tiny_llava_onevision
from tiny_smolvlm import make_tiny_smolvlm
from tiny_video_llava import make_tiny_video_llava

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

MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": partial(make_tiny, **_QWEN),
    "qwen2_vl": partial(make_tiny, model_type="qwen2_vl", **_QWEN),
    "llava": partial(make_tiny_llava, text=_TEXT),
    "llava_next": partial(make_tiny_llava_next, text=_TEXT),
    "llava_onevision": partial(make_tiny_llava_onevision, text=_TEXT),
    "video_llava": partial(make_tiny_video_llava, text=_TEXT),
    "smolvlm": partial(make_tiny_smolvlm, text=_TEXT),
}
"""Family -> what writes a tiny checkpoint of it."""

# TensorRT-RTX has no float32 Attention, and needs none: dialect and precision go together.
PRECISIONS = {Dialect.PORTABLE: Precision.FP32, Dialect.MODERN: Precision.BF16}

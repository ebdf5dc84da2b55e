"""One tiny checkpoint of every family, for what has to hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tiny import make_tiny
from tiny_llava import make_tiny_llava, make_tiny_llava_next
from tiny_llava_onevision import make_tiny_llava_onevision
from tiny_smolvlm import make_tiny_smolvlm
from tiny_video_llava import make_tiny_video_llava

__all__ = ["TINY_FAMILIES"]

_TEXT = {"num_hidden_layers": 2}
_QWEN: Mapping[str, Any] = {"layers": 2, "vision_depth": 2}

TINY_FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": partial(make_tiny, **_QWEN),
    "qwen2_vl": partial(make_tiny, model_type="qwen2_vl", **_QWEN),
    "llava": partial(make_tiny_llava, text=_TEXT),
    "llava_next": partial(make_tiny_llava_next, text=_TEXT),
    "llava_onevision": partial(make_tiny_llava_onevision, text=_TEXT),
    "smolvlm": partial(make_tiny_smolvlm, text=_TEXT),
    "idefics3": partial(make_tiny_smolvlm, model_type="idefics3", text=_TEXT),
    "video_llava": partial(make_tiny_video_llava, text=_TEXT),
}
"""Name -> writes a checkpoint directory. Two decoder layers each."""

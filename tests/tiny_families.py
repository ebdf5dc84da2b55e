"""One tiny checkpoint of every family, for what has to hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tiny import make_tiny
from tiny_llava import make_tiny_llava, make_tiny_llava_next
from tiny_llava_onevision import make_tiny_llava_onevision
from tiny_smolvlm import make_tiny_smolvlm
from tiny_video_llava import make_tiny_video_llava

__all__ = ["TINY_FAMILIES"]

TINY_FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": make_tiny,
    "qwen2_vl": partial(make_tiny, model_type="qwen2_vl"),
    "llava": make_tiny_llava,
    "llava_next": make_tiny_llava_next,
    "llava_onevision": make_tiny_llava_onevision,
    "smolvlm": make_tiny_smolvlm,
    "idefics3": partial(make_tiny_smolvlm, model_type="idefics3"),
    "video_llava": make_tiny_video_llava,
}
"""Name -> writes a checkpoint directory. Four decoder layers each."""

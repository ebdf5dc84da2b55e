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

__all__ = ["TINY_FAMILIES", "makers"]


def makers(qwen: Mapping[str, Any], text: Mapping[str, Any]) -> Mapping[str, Callable[[Path], Path]]:
    """Name -> writes a checkpoint directory.

    Args:
        qwen: Sizes of the Qwen models, as `make_tiny` takes them.
        text: Of the others: fields of their text config.
    """
    return {
        "qwen2_5_vl": partial(make_tiny, **qwen),
        "qwen2_vl": partial(make_tiny, model_type="qwen2_vl", **qwen),
        "llava": partial(make_tiny_llava, text=text),
        "llava_next": partial(make_tiny_llava_next, text=text),
        "llava_onevision": partial(make_tiny_llava_onevision, text=text),
        "smolvlm": partial(make_tiny_smolvlm, text=text),
        "idefics3": partial(make_tiny_smolvlm, model_type="idefics3", text=text),
        "video_llava": partial(make_tiny_video_llava, text=text),
    }


TINY_FAMILIES = makers({"layers": 2, "vision_depth": 2}, {"num_hidden_layers": 2})
"""Two decoder layers each."""

"""Video-LLaVA: LLaVA-1.5 with two CLIP towers, one for pictures and one for the frames of videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_export.families.base import VisionTrace
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import TowerFeatures, clip_features
from ep_export.families.llava import Llava
from ep_export.families.video_llava_prompt import VideoLlavaPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["VideoLlava"]

_TYPICAL_FRAMES = 8
"""Frames the model was trained with and is published with: 8 x 257 = 2056 visual tokens."""


class VideoLlava(Llava):
    """Checkpoints whose `model_type` is `video_llava`, with CLIP towers and a Llama or Mistral decoder."""

    name = "video_llava"
    model_types = ("video_llava",)
    verified = (
        "random tiny weights in every key layout against Hugging Face, full and pruned: pictures, a video, "
        "both; 4 layers of the 7B shape with both towers exported; published weights, and frames resized "
        "by torchvision: not available here"
    )

    def default_visual_tokens(self, config: PreTrainedConfig) -> int:
        """Visual tokens of a video of 8 frames."""
        return _TYPICAL_FRAMES * _frame_features(config).tokens

    def prompt_builder(self, processor: Path, config: PreTrainedConfig) -> ChatPrompts:
        """Prompt builder from a directory with tokenizer and image processor files."""
        return VideoLlavaPrompts(processor, config)

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The encoder of pictures, cut for tracing, sharing the model's own parameters."""
        parts: Any = model.model
        return _trace(parts.image_tower, parts, clip_features(model.config))

    def video(self, model: PreTrainedModel) -> VisionTrace:
        """The encoder of a video's frames; it ends in the projector that the pictures' ends in."""
        parts: Any = model.model
        return _trace(parts.video_tower, parts, _frame_features(model.config))


def _frame_features(config: PreTrainedConfig) -> TowerFeatures:
    return replace(clip_features(config), with_class=True)


def _trace(tower: Any, parts: Any, features: TowerFeatures) -> VisionTrace:
    from ep_export.families.clip_tower import ClipStem, tower_trace

    return tower_trace(ClipStem(tower), tower, parts.multi_modal_projector, features)

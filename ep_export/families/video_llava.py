"""Video-LLaVA: LLaVA-1.5 with two CLIP towers, one for pictures and one for the frames of videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_export.families.base import TYPICAL_PICTURE, VisionTrace
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import TowerFeatures, clip_features
from ep_export.families.llava import Llava
from ep_export.families.video_llava_prompt import VideoLlavaPrompts
from ep_export.vision_flops import VisionCall, VisionTower

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

    def vision_tower(self, config: PreTrainedConfig) -> VisionTower:
        """Shape of either encoder; see `Family.vision_tower`."""
        return replace(super().vision_tower(config), towers=2)

    def video_calls(
        self,
        size: tuple[int, int],  # noqa: ARG002 - every frame is one square
        frames: int,
        config: PreTrainedConfig,
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> tuple[VisionCall, ...]:
        """A frame a call; see `Family.video_calls`."""
        features = _frame_features(config)
        return (VisionCall(1, (features.side, features.side), features.tokens),) * frames

    def typical_calls(
        self, config: PreTrainedConfig, settings: Mapping[str, Any] | None = None
    ) -> tuple[VisionCall, ...]:
        """A video of 8 frames."""
        return self.video_calls(TYPICAL_PICTURE, _TYPICAL_FRAMES, config, settings or {})

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

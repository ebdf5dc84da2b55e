"""LLaVA-1.5: a CLIP tower, a two-layer projector, Llama. One square picture is one run of visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.families.base import DecoderModules, Family, Picture, PromptInputs, VisionTrace
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import clip_features, tower_shape
from ep_export.families.language_model import decoder_modules
from ep_export.families.llama_text import text_dims
from ep_export.families.llava_prompt import LlavaPrompts
from ep_export.vision_flops import VisionCall, VisionTower

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Llava"]


class Llava(Family):
    """Checkpoints whose `model_type` is `llava`, with a CLIP tower and a Llama or Mistral decoder."""

    name = "llava"
    model_types = ("llava",)
    verified = (
        "random tiny weights in every key layout against Hugging Face, full and pruned; 4 layers of the 7B "
        "shape exported; published weights: not available here"
    )

    def dims(self, config: PreTrainedConfig) -> DecoderDims:
        """Dimensions of the decoder; see `Family.dims`."""
        clip_features(config)
        return text_dims(config)

    def vision_tower(self, config: PreTrainedConfig) -> VisionTower:
        """Shape of the vision encoder; see `Family.vision_tower`."""
        return tower_shape(config, clip_features(config))

    def picture_call(
        self,
        size: tuple[int, int],  # noqa: ARG002
        config: PreTrainedConfig,
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> VisionCall:
        """Every picture is one square; see `Family.picture_call`."""
        features = clip_features(config)
        return VisionCall(1, (features.side, features.side), features.tokens)

    def prompt_builder(self, processor: Path, config: PreTrainedConfig) -> ChatPrompts:
        """Prompt builder from a directory with tokenizer and image processor files."""
        return LlavaPrompts(processor, config)

    def vision_feeds(self, picture: Picture, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:  # noqa: ARG002
        """Inputs of `vision_encoder.onnx` for one picture.

        Returns:
            `pixel_values` [1, 3, image_size, image_size] float32.
        """
        return {"pixel_values": picture.pixel_values}

    def reference_inputs(self, prompt: PromptInputs, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Keyword arguments for `forward` and `generate`, positions left to Hugging Face."""
        import torch

        ids = torch.from_numpy(prompt.input_ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pictures = [picture for picture in prompt.pictures if picture.video is None]
        frames = [picture for picture in prompt.pictures if picture.video is not None]
        arrays = {
            **(self._reference_pictures(pictures, config) if pictures else {}),
            **(_reference_videos(frames) if frames else {}),
        }
        return {**inputs, **{name: torch.from_numpy(array) for name, array in arrays.items()}}

    def _reference_pictures(
        self,
        pictures: Sequence[Picture],
        config: PreTrainedConfig,  # noqa: ARG002
    ) -> dict[str, NDArray[Any]]:
        """What the image processor makes of all pictures together."""
        return {"pixel_values": np.concatenate([picture.pixel_values for picture in pictures])}

    def patches_per_token(self, config: PreTrainedConfig) -> int | None:
        """A patch is a token; see `Family.patches_per_token`."""
        return None if clip_features(config).with_class else 1

    def decoder(self, model: PreTrainedModel) -> DecoderModules:
        """The decoder's modules; see `Family.decoder`."""
        return decoder_modules(model)

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""
        from ep_export.families.clip_tower import ClipStem, tower_trace

        parts: Any = model.model
        tower, features = parts.vision_tower, clip_features(model.config)
        return tower_trace(ClipStem(tower), tower, parts.multi_modal_projector, features)


def _reference_videos(frames: Sequence[Picture]) -> dict[str, NDArray[Any]]:
    """What the video processor makes of all videos together: [videos, frames, 3, height, width]."""
    videos = [
        np.concatenate([frame.pixel_values for frame in group])
        for _, group in groupby(frames, key=lambda frame: frame.video)
    ]
    lengths = [video.shape[0] for video in videos]
    if len(set(lengths)) > 1:
        raise UserError(
            f"Hugging Face takes videos of equal length only, got {', '.join(map(str, lengths))} frames",
            hint="sample as many frames of each",
        )
    return {"pixel_values_videos": np.stack(videos)}

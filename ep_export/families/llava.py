"""LLaVA-1.5: a CLIP tower, a two-layer projector, Llama. One square picture is one run of visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.families.base import DecoderModules, Family, Picture, PromptInputs, VisionTrace
from ep_export.families.chat_prompts import ChatPrompts
from ep_export.families.clip_features import clip_features
from ep_export.families.language_model import decoder_modules
from ep_export.families.llama_text import text_dims
from ep_export.families.llava_prompt import LlavaPrompts

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

    def default_visual_tokens(self, config: PreTrainedConfig) -> int:
        """Visual tokens of any picture."""
        features = clip_features(config)
        return features.side**2 + features.with_class

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
        if prompt.pictures:
            arrays = self._reference_pictures(prompt.pictures, config)
            inputs.update({name: torch.from_numpy(array) for name, array in arrays.items()})
        return inputs

    def _reference_pictures(
        self,
        pictures: Sequence[Picture],
        config: PreTrainedConfig,  # noqa: ARG002
    ) -> dict[str, NDArray[Any]]:
        """What the image processor makes of all pictures together."""
        return {"pixel_values": np.concatenate([picture.pixel_values for picture in pictures])}

    def decoder(self, model: PreTrainedModel) -> DecoderModules:
        """The decoder's modules; see `Family.decoder`."""
        return decoder_modules(model)

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""
        from ep_export.families.clip_tower import ClipBlock, ClipStem, FeatureProjector

        parts: Any = model.model
        features = clip_features(model.config)
        size = features.image_size
        return VisionTrace(
            stem=ClipStem(parts.vision_tower),
            blocks=[ClipBlock(layer) for layer in parts.vision_tower.encoder.layers[: features.blocks]],
            kinds=["full"] * features.blocks,
            merger=FeatureProjector(parts.multi_modal_projector, with_class=features.with_class),
            carry_names=(),
            example_feeds={"pixel_values": np.zeros((1, 3, size, size), dtype=np.float32)},
            dynamic_axes={},
        )

"""Qwen2.5-VL: dimensions, prompts, where the decoder sits and how the vision encoder is traced."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.families.base import DecoderModules, Family, Picture, PromptInputs, VisionTrace
from ep_export.families.language_model import decoder_modules
from ep_export.families.qwen2_5_vl_prompt import Qwen2_5_VLPrompts
from ep_export.families.windows import patch_positions, window_layout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Qwen2_5_VL"]

# A photograph of 640 x 480, the size of most benchmark pictures: 23 x 17 = 391 visual tokens.
_TYPICAL_PICTURE = (640, 480)


class Qwen2_5_VL(Family):  # noqa: N801 - the model's name
    """Checkpoints whose `model_type` is `qwen2_5_vl`, of any size."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    verified = (
        "small trained and random tiny weights against Hugging Face; 7B shape built with random weights; "
        "published weights: not available here"
    )

    def dims(self, config: PreTrainedConfig) -> DecoderDims:
        """Dimensions of the decoder; see `Family.dims`."""
        text = config.text_config
        _refuse_unsupported(text)
        return DecoderDims(
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            ffn_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            position_axes=3,
        )

    def default_visual_tokens(self, config: PreTrainedConfig) -> int:
        """Visual tokens of a 640 x 480 photograph."""
        side = _patch_size(config) * config.vision_config.spatial_merge_size
        width, height = (max(1, round(pixels / side)) for pixels in _TYPICAL_PICTURE)
        return int(width * height)

    def prompt_builder(self, processor: Path, config: PreTrainedConfig) -> Qwen2_5_VLPrompts:
        """Prompt builder from a directory with tokenizer and image processor files."""
        return Qwen2_5_VLPrompts(processor, config)

    def vision_feeds(self, picture: Picture, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:
        """Inputs of `vision_encoder.onnx` for one picture, in the stem's order.

        Returns:
            `pixel_values` [P, channels * time * patch * patch] float32; `patch_positions` [P, 2] int64;
            `window_index` [W, T] int64, -1 where a slot has no patch; `window_inverse` [P] int64.
        """
        vision = config.vision_config
        merge = vision.spatial_merge_size
        _, height, width = picture.grid
        index, inverse = window_layout(height, width, side=_window_side(config), merge_size=merge)
        return {
            "pixel_values": picture.pixel_values,
            "patch_positions": patch_positions(height, width, merge_size=merge),
            "window_index": index,
            "window_inverse": inverse,
        }

    def reference_inputs(self, prompt: PromptInputs, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Keyword arguments for `forward` and `generate`, positions left to Hugging Face."""
        import torch

        ids = torch.from_numpy(prompt.input_ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.pictures:
            pixels = np.concatenate([picture.pixel_values for picture in prompt.pictures])
            inputs["pixel_values"] = torch.from_numpy(pixels)
            inputs["image_grid_thw"] = torch.tensor([picture.grid for picture in prompt.pictures])
            # Hugging Face computes mRoPE positions only when told which tokens are pictures.
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        return inputs

    def decoder(self, model: PreTrainedModel) -> DecoderModules:
        """The decoder's modules; `rotary` has real buffers even when the model is on `meta`."""
        return decoder_modules(model)

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""
        from ep_export.families.qwen2_5_vl_vision import FullBlock, PatchMerger, VisionStem, WindowBlock

        visual: Any = model.model.visual
        full = set(visual.fullatt_block_indexes)
        kinds = ["full" if i in full else "window" for i in range(len(visual.blocks))]
        classes = {"full": FullBlock, "window": WindowBlock}
        return VisionTrace(
            stem=VisionStem(visual),
            blocks=[classes[kind](block) for kind, block in zip(kinds, visual.blocks, strict=True)],
            kinds=kinds,
            merger=PatchMerger(visual.merger),
            carry_names=("cos", "sin", "slots", "mask", "window_inverse"),
            example_feeds=self._example_feeds(model.config),
            dynamic_axes={
                "pixel_values": {0: "patches"},
                "patch_positions": {0: "patches"},
                "window_index": {0: "windows"},
                "window_inverse": {0: "patches"},
            },
        )

    def _example_feeds(self, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:
        """A blank picture one merge block wider and higher than a window: four windows, three padded."""
        vision = config.vision_config
        blocks = _window_side(config) + 1
        side = blocks * vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        blank = Picture(
            pixel_values=np.zeros((side * side, width), dtype=np.float32),
            grid=(1, side, side),
            token_grid=(blocks, blocks),
            size=(side * vision.patch_size, side * vision.patch_size),
        )
        return self.vision_feeds(blank, config)


def _refuse_unsupported(text: PreTrainedConfig) -> None:
    """Stop at what would change the mathematics of the decoder."""
    hint = "only the published Qwen2.5-VL forms are supported"
    if "sliding_attention" in (text.layer_types or ()):
        raise UserError(
            "config uses sliding-window attention in the decoder, expected full attention", hint=hint
        )
    kind = text.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise UserError(f"config has rope_type {kind!r}, expected default", hint=hint)
    if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
        raise UserError(
            f"config has hidden_size {text.hidden_size}, {text.num_attention_heads} heads and "
            f"{text.num_key_value_heads} kv heads, which do not divide",
            hint="check config.json",
        )
    sections, head_dim = text.rope_parameters["mrope_section"], text.hidden_size // text.num_attention_heads
    if 2 * sum(sections) != head_dim:
        raise UserError(
            f"config has mrope_section {sections}, expected a sum of half the head dimension {head_dim}",
            hint="check config.json",
        )


def _patch_size(config: PreTrainedConfig) -> int:
    return int(config.vision_config.patch_size)


def _window_side(config: PreTrainedConfig) -> int:
    """Merge blocks along a window's side."""
    vision = config.vision_config
    return int(vision.window_size // vision.spatial_merge_size // _patch_size(config))

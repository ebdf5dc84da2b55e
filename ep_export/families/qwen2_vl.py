"""Qwen2-VL: dimensions, prompts, where the decoder sits and how the vision encoder is traced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.errors import UserError, as_user_error
from ep_export.families.base import DecoderModules, Family, Picture, PromptInputs, VisionTrace
from ep_export.families.language_model import decoder_modules
from ep_export.families.qwen2_vl_prompt import Qwen2VLPrompts
from ep_export.families.windows import patch_positions
from ep_export.vision_flops import VisionCall, VisionTower

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Qwen2VL"]

# Pixels of a picture after scaling, at least and at most, in the published preprocessor_config.json.
_PUBLISHED_PIXELS = (56 * 56, 16384 * 28 * 28)


class Qwen2VL(Family):
    """Checkpoints whose `model_type` is `qwen2_vl`, of any size."""

    name = "qwen2_vl"
    model_types = ("qwen2_vl",)
    verified = (
        "random tiny weights in every key layout against Hugging Face, pictures and videos, full and pruned; "
        "4 layers of the 7B shape exported; published weights: not available here"
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

    def vision_tower(self, config: PreTrainedConfig) -> VisionTower:
        """Shape of the vision encoder; see `Family.vision_tower`."""
        vision = config.vision_config
        joined = vision.spatial_merge_size**2
        return VisionTower(
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            blocks=vision.depth,
            hidden_size=vision.embed_dim,
            heads=vision.num_heads,
            ffn_size=int(vision.embed_dim * vision.mlp_ratio),
            gated=False,
            joined=joined,
            projector=(joined * vision.embed_dim, vision.hidden_size),
        )

    def picture_call(
        self, size: tuple[int, int], config: PreTrainedConfig, settings: Mapping[str, Any]
    ) -> VisionCall:
        """One call on a grid that follows the picture's shape; see `Family.picture_call`."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        vision = config.vision_config
        bounds = settings.get("size") or {}
        least, most = (
            int(settings.get(old) or bounds.get(new) or published)
            for old, new, published in zip(
                ("min_pixels", "max_pixels"),
                ("shortest_edge", "longest_edge"),
                _PUBLISHED_PIXELS,
                strict=True,
            )
        )
        merge = vision.spatial_merge_size
        width, height = size
        with as_user_error(
            f"a picture of {width} x {height} pixels cannot be prepared", hint="give another size"
        ):
            scaled = smart_resize(height, width, vision.patch_size * merge, least, most)
        rows, columns = (pixels // vision.patch_size for pixels in scaled)
        return VisionCall(1, (rows, columns), rows * columns // merge**2)

    def video_calls(
        self, size: tuple[int, int], frames: int, config: PreTrainedConfig, settings: Mapping[str, Any]
    ) -> tuple[VisionCall, ...]:
        """A part is a temporal patch; see `Family.video_calls`."""
        parts = -(-frames // config.vision_config.temporal_patch_size)
        call = self.picture_call(size, config, settings)
        return tuple(call for _ in range(parts))

    def prompt_builder(self, processor: Path, config: PreTrainedConfig) -> Qwen2VLPrompts:
        """Prompt builder from a directory with tokenizer and image processor files."""
        return Qwen2VLPrompts(processor, config)

    def vision_feeds(self, picture: Picture, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:
        """Inputs of `vision_encoder.onnx` for one picture or part of a video, in the stem's order.

        Returns:
            `pixel_values` [P, channels * time * patch * patch] float32; `patch_positions` [P, 2] int64.
        """
        _, height, width = picture.grid
        merge = config.vision_config.spatial_merge_size
        return {
            "pixel_values": picture.pixel_values,
            "patch_positions": patch_positions(height, width, merge_size=merge),
        }

    def reference_inputs(self, prompt: PromptInputs, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Keyword arguments for `forward` and `generate`, positions left to Hugging Face."""
        import torch

        ids = torch.from_numpy(prompt.input_ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.pictures:
            # Hugging Face computes mRoPE positions only when told which tokens are pictures, which videos.
            kinds = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
            inputs["mm_token_type_ids"] = kinds.int()
        pictures = [picture for picture in prompt.pictures if picture.video is None]
        if pictures:
            inputs["pixel_values"] = _stacked(pictures)
            inputs["image_grid_thw"] = torch.tensor([picture.grid for picture in pictures])
        parts = [picture for picture in prompt.pictures if picture.video is not None]
        if parts:
            videos: dict[int | None, list[Picture]] = {}
            for part in parts:
                videos.setdefault(part.video, []).append(part)
            inputs["pixel_values_videos"] = _stacked(parts)
            inputs["video_grid_thw"] = torch.tensor(
                [(len(video), *video[0].grid[1:]) for video in videos.values()]
            )
            if hasattr(config.vision_config, "tokens_per_second"):
                seconds = [video[0].seconds for video in videos.values()]
                inputs["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32)
        return inputs

    def patches_per_token(self, config: PreTrainedConfig) -> int:
        """Of a square; see `Family.patches_per_token`."""
        return int(config.vision_config.spatial_merge_size) ** 2

    def decoder(self, model: PreTrainedModel) -> DecoderModules:
        """The decoder's modules; `rotary` has real buffers even when the model is on `meta`."""
        return decoder_modules(model)

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""
        from ep_export.families.qwen2_vl_vision import FullBlock, PatchMerger, VisionStem

        visual: Any = model.model.visual
        return VisionTrace(
            stem=VisionStem(visual),
            blocks=[FullBlock(block) for block in visual.blocks],
            kinds=["full"] * len(visual.blocks),
            merger=PatchMerger(visual.merger),
            carry_names=("cos", "sin"),
            example_feeds=self.vision_feeds(self._example(model.config, 3), model.config),
            dynamic_axes={"pixel_values": {0: "patches"}, "patch_positions": {0: "patches"}},
        )

    def _example(self, config: PreTrainedConfig, blocks: int) -> Picture:
        """A blank square picture of so many merge blocks along its side."""
        vision = config.vision_config
        side = blocks * vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return Picture(
            pixel_values=np.zeros((side * side, width), dtype=np.float32),
            grid=(1, side, side),
            token_grid=(blocks, blocks),
            size=(side * vision.patch_size, side * vision.patch_size),
        )


def _stacked(pictures: list[Picture]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.concatenate([picture.pixel_values for picture in pictures]))


def _refuse_unsupported(text: PreTrainedConfig) -> None:
    """Stop at what would change the mathematics of the decoder."""
    hint = "only the published Qwen2-VL and Qwen2.5-VL forms are supported"
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
    head_dim = text.hidden_size // text.num_attention_heads
    sections = text.rope_parameters.get("mrope_section")
    if not _three_sizes(sections) or 2 * sum(sections) != head_dim:
        raise UserError(
            f"config has mrope_section {sections}, expected three sizes whose sum is half the head dimension "
            f"{head_dim}",
            hint="check config.json",
        )


def _three_sizes(sections: Any) -> bool:
    return (
        isinstance(sections, list)
        and len(sections) == 3
        and all(type(size) is int and size > 0 for size in sections)
    )

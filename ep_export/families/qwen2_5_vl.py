"""Qwen2.5-VL: Qwen2-VL whose vision encoder mostly attends within windows, and whose videos count seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.families.base import Picture, VisionTrace
from ep_export.families.qwen2_vl import Qwen2VL
from ep_export.families.windows import window_layout
from ep_export.vision_flops import VisionTower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Qwen2_5_VL"]


class Qwen2_5_VL(Qwen2VL):  # noqa: N801 - the model's name
    """Checkpoints whose `model_type` is `qwen2_5_vl`, of any size."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    verified = (
        "small trained and random tiny weights against Hugging Face, pictures and videos; 7B shape built "
        "with random weights; published weights: not available here"
    )

    def dims(self, config: PreTrainedConfig) -> DecoderDims:
        """Dimensions of the decoder; see `Family.dims`."""
        if not _window_side(config):
            vision = config.vision_config
            raise UserError(
                f"config has a window_size of {vision.window_size} pixels, expected at least a merge block: "
                f"{vision.spatial_merge_size} patches of {vision.patch_size}",
                hint="check config.json",
            )
        return super().dims(config)

    def vision_tower(self, config: PreTrainedConfig) -> VisionTower:
        """Shape of the vision encoder; see `Family.vision_tower`."""
        vision = config.vision_config
        joined = vision.spatial_merge_size**2
        full = {block for block in vision.fullatt_block_indexes if 0 <= block < vision.depth}
        return VisionTower(
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            blocks=vision.depth,
            hidden_size=vision.hidden_size,
            heads=vision.num_heads,
            ffn_size=vision.intermediate_size,
            gated=True,
            joined=joined,
            projector=(joined * vision.hidden_size, vision.out_hidden_size),
            window_side=_window_side(config) * vision.spatial_merge_size,
            full_blocks=len(full),
        )

    def vision_feeds(self, picture: Picture, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:
        """Inputs of `vision_encoder.onnx` for one picture or part of a video, in the stem's order.

        Returns:
            `pixel_values` [P, channels * time * patch * patch] float32; `patch_positions` [P, 2] int64;
            `window_index` [W, T] int64, -1 where a slot has no patch; `window_inverse` [P] int64.
        """
        _, height, width = picture.grid
        merge = config.vision_config.spatial_merge_size
        index, inverse = window_layout(height, width, side=_window_side(config), merge_size=merge)
        return {
            **super().vision_feeds(picture, config),
            "window_index": index,
            "window_inverse": inverse,
        }

    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""
        from ep_export.families.qwen2_5_vl_vision import WindowBlock, WindowStem
        from ep_export.families.qwen2_vl_vision import FullBlock, PatchMerger, VisionStem

        visual: Any = model.model.visual
        full = set(visual.fullatt_block_indexes)
        kinds = ["full" if i in full else "window" for i in range(len(visual.blocks))]
        classes = {"full": FullBlock, "window": WindowBlock}
        # One merge block wider and higher than a window: four windows, three padded.
        example = self._example(model.config, _window_side(model.config) + 1)
        return VisionTrace(
            stem=WindowStem(VisionStem(visual)),
            blocks=[classes[kind](block) for kind, block in zip(kinds, visual.blocks, strict=True)],
            kinds=kinds,
            merger=PatchMerger(visual.merger),
            carry_names=("cos", "sin", "slots", "mask", "window_inverse"),
            example_feeds=self.vision_feeds(example, model.config),
            dynamic_axes={
                "pixel_values": {0: "patches"},
                "patch_positions": {0: "patches"},
                "window_index": {0: "windows"},
                "window_inverse": {0: "patches"},
            },
        )


def _window_side(config: PreTrainedConfig) -> int:
    """Merge blocks along a window's side."""
    vision = config.vision_config
    return int(vision.window_size // vision.spatial_merge_size // vision.patch_size)

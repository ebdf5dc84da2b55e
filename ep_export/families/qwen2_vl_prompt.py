"""Pictures, videos and a question as the arrays of Qwen2-VL and Qwen2.5-VL; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError, as_user_error
from ep_export.families import processor_files as files
from ep_export.families.base import Picture, Video
from ep_export.families.bounds import check_settings
from ep_export.families.chat_prompts import ChatPrompts, Parts
from ep_export.families.mrope import VisualRun, mrope_positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Qwen2VLPrompts", "seconds_to_positions"]

# What Hugging Face's video processor takes where the checkpoint's files say nothing: pixels of a frame.
_VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
# Its bound on a whole video, where the files ask for one: 90% of these tokens.
_VIDEO_TOKENS = 128_000
_SHARED_SETTINGS = (
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
)


def seconds_to_positions(seconds: float, config: PreTrainedConfig) -> float:
    """Time positions between the parts of a video: Qwen2-VL counts parts, Qwen2.5-VL counts time."""
    rate = getattr(config.vision_config, "tokens_per_second", None)
    return 1.0 if rate is None else float(np.float32(rate) * np.float32(seconds))


class Qwen2VLPrompts(ChatPrompts):
    """The prompt builder; see `ep_export.families.chat_prompts.ChatPrompts`."""

    def __init__(self, processor: Path, config: PreTrainedConfig) -> None:
        """Load tokenizer, chat template and image processor from a local directory.

        Raises:
            UserError: A file is missing or unusable.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        super().__init__(processor, config, image_processor=Qwen2VLImageProcessorPil, areas=True)
        self._config = config
        self._video_settings = files.video_settings(processor)
        self._videos = _video_processor(self._video_settings, processor)
        for each, what in ((self._images, "pictures"), (self._videos, "videos")):
            _refuse_other_patches(each, config, f"{processor} cuts {what}")

    def _process(self, pixels: NDArray[np.uint8]) -> Picture:
        made = files.prepare(self._images, [pixels])
        time, rows, columns = (int(n) for n in made["image_grid_thw"][0])
        merge = int(self._images.merge_size)
        return Picture(
            pixel_values=np.ascontiguousarray(made["pixel_values"], dtype=np.float32),
            grid=(time, rows, columns),
            token_grid=(rows // merge, columns // merge),
            size=(pixels.shape[1], pixels.shape[0]),
        )

    def _process_video(self, video: Video) -> Parts:
        """A part is one temporal patch, two frames: Hugging Face's vision encoder attends within it alone.

        Hugging Face's video processor needs torchvision, whose bicubic scaling of tensors differs from
        Pillow's in the last digit of some pixels; sizes, padding and patches are the same.
        """
        frames = self._frames(video)
        made = files.prepare(self._videos, list(frames), size=self._frame_size(len(frames)))
        _, rows, columns = (int(n) for n in made["image_grid_thw"][0])
        merge, depth = int(self._videos.merge_size), int(self._videos.temporal_patch_size)
        patches = np.asarray(made["pixel_values"], dtype=np.float32)
        # The image processor fills a temporal patch with copies of one frame: [frames, patches, 3, area].
        area = int(self._videos.patch_size) ** 2
        patches = patches.reshape(len(frames), rows * columns, -1, depth, area)[:, :, :, 0]
        # The last frame fills up the last patch.
        order = np.minimum(np.arange(-(-len(frames) // depth) * depth), len(frames) - 1).reshape(-1, depth)
        return tuple(
            Picture(
                pixel_values=np.stack(list(patches[slots]), axis=2).reshape(rows * columns, -1),
                grid=(1, rows, columns),
                token_grid=(rows // merge, columns // merge),
                size=(frames.shape[2], frames.shape[1]),
                seconds=depth / video.fps,
            )
            for slots in order
        )

    def _frame_size(self, frames: int) -> dict[str, int]:
        """Bounds on the pixels of a frame; where the files ask for it, a share of the whole video's."""
        least, most = self._videos.size["shortest_edge"], self._videos.size["longest_edge"]
        if self._video_settings.get("cap_pixels_per_frame"):
            side = int(self._videos.patch_size) * int(self._videos.merge_size)
            tokens = self._video_settings.get("max_video_tokens") or _VIDEO_TOKENS
            whole = int(tokens * side * side * 0.9) * int(self._videos.temporal_patch_size)
            most = max(min(most, whole // frames), int(least * 1.05))
        return {"shortest_edge": least, "longest_edge": most}

    def _positions(
        self, input_ids: NDArray[np.int64], pictures: Sequence[Picture]
    ) -> tuple[NDArray[np.int64], int]:
        runs: list[VisualRun] = []
        for video, group in groupby(pictures, key=lambda picture: picture.video):
            parts = list(group)
            if video is None:
                runs += [VisualRun(1, *picture.token_grid) for picture in parts]
            else:
                interval = seconds_to_positions(parts[0].seconds, self._config)
                runs.append(VisualRun(len(parts), *parts[0].token_grid, interval))
        return mrope_positions(input_ids, self._placeholders, runs)


def _video_processor(settings: dict[str, Any], processor: Path) -> Any:
    """The image processor with the video processor's settings.

    Raises:
        UserError: They are unusable.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    check_settings(settings, f"the video settings in {processor}", areas=True)
    size = settings.get("size") or _VIDEO_SIZE
    with as_user_error(
        f"the video settings in {processor} are broken", hint="copy them from the checkpoint again"
    ):
        return Qwen2VLImageProcessorPil(
            size={
                "shortest_edge": int(settings.get("min_pixels") or size["shortest_edge"]),
                "longest_edge": int(settings.get("max_pixels") or size["longest_edge"]),
            },
            **{name: settings[name] for name in _SHARED_SETTINGS if settings.get(name) is not None},
        )


def _refuse_other_patches(images: Any, config: PreTrainedConfig, what: str) -> None:
    """Stop where the processor and the vision encoder take different patches."""
    vision = config.vision_config
    expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    found = (images.patch_size, images.merge_size, images.temporal_patch_size)
    if found != expected:
        raise UserError(
            f"{what} into patches of {found[0]} pixels, {found[1]} x {found[1]} a token, {found[2]} frames "
            f"deep; the model takes {expected[0]}, {expected[1]} x {expected[1]} and {expected[2]}",
            hint="copy the processor's files and config.json from one checkpoint again",
        )

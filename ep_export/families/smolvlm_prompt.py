"""Pictures, videos and a question as SmolVLM's arrays; without torch.

A picture is a grid of square tiles, each announced by its row and column, and the whole picture once more.
A video is its frames, each one tile, with the time before it. Words and visual tokens are tokenized together,
as Hugging Face does it. The text for both is that of its processor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError
from ep_export.families.base import Picture, PromptInputs, Turn, Video
from ep_export.families.chat_prompts import ChatPrompts, Parts
from ep_export.families.number_words import number_words
from ep_export.families.processor_files import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["SmolVLMPrompts", "tile_cells", "tile_side", "tokens_along"]

_IMAGE, _VIDEO, _AROUND, _WHOLE = "<image>", "<video>", "<fake_token_around_image>", "<global-img>"
_MOST_FRAMES = 999


def tile_side(config: PreTrainedConfig) -> int:
    """Patches along a tile's side."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def tokens_along(config: PreTrainedConfig) -> int:
    """Visual tokens along a tile's side."""
    return tile_side(config) // int(config.scale_factor)


def tile_cells(tiles: tuple[int, int], along: int) -> NDArray[np.int64]:
    """Where in the picture every visual token looks.

    Args:
        tiles: Rows and columns of tiles.
        along: Visual tokens along a tile's side.

    Returns:
        [N] int64, the row-major cell of every token, tile by tile; -1 for the picture seen whole, which comes
        last.
    """
    rows, columns = tiles
    grid = np.arange(rows * columns * along * along).reshape(rows, along, columns, along)
    whole = np.full(along * along, -1)
    return np.concatenate([grid.transpose(0, 2, 1, 3).ravel(), whole]).astype(np.int64)


class SmolVLMPrompts(ChatPrompts):
    """The prompt builder; see `ep_export.families.chat_prompts.ChatPrompts`."""

    def __init__(self, processor: Path, config: PreTrainedConfig) -> None:
        """Load tokenizer, chat template and image processor from a local directory.

        Raises:
            UserError: A file is missing or unusable.
        """
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        super().__init__(processor, config, image_processor=SmolVLMImageProcessorPil)
        self._tile: int = config.vision_config.image_size
        self._side, self._along = tile_side(config), tokens_along(config)
        self._takes_videos = config.model_type == "smolvlm"
        self._own_template = self._template
        # Not every tokenizer has a token for it, and a question must not place a video.
        self._special = tuple(dict.fromkeys([*self._special, _VIDEO]))

    def build_chat(self, turns: Sequence[Turn]) -> PromptInputs:
        """Apply the chat template to a conversation, as Hugging Face would.

        Raises:
            UserError: See `ChatPrompts.build_chat`.
        """
        # Hugging Face's processor sets the checkpoint's own template aside for videos: it lacks them.
        videos = any(isinstance(part, Video) for turn in turns for part in turn.parts)
        self._template = _video_template() if videos and self._takes_videos else self._own_template
        return super().build_chat(turns)

    def _process(self, pixels: NDArray[np.uint8]) -> Picture:
        made = self._tiles([pixels], return_row_col_info=True)
        rows, columns = made["rows"][0][0], made["cols"][0][0]
        return self._picture(
            self._checked(made, 1 + rows * columns), (rows, columns), (pixels.shape[1], pixels.shape[0])
        )

    def _process_video(self, video: Video) -> Parts:
        """Every frame as one tile: the picture seen whole.

        As the image processor does it without splitting. Hugging Face's video processor scales with
        torchvision (Lanczos from 0.27 on, bicubic before), this one with Pillow's Lanczos; the two were not
        compared here.
        """
        if not self._takes_videos:
            return super()._process_video(video)
        frames = self._frames(video)
        if len(frames) > _MOST_FRAMES:
            raise UserError(
                f"video has {len(frames)} frames, expected at most {_MOST_FRAMES}", hint="take fewer of them"
            )
        sampling = getattr(self._images, "video_sampling", None) or {}
        size = sampling.get("video_size", {"longest_edge": self._tile})
        values = self._checked(self._tiles(list(frames), do_image_splitting=False, size=size), len(frames))
        shape = (frames.shape[2], frames.shape[1])
        seconds = 1 / video.fps
        return tuple(self._picture(value[None], (0, 0), shape, seconds=seconds) for value in values)

    def _tiles(self, pictures: list[NDArray[np.uint8]], **options: Any) -> Any:
        return prepare(self._images, [pictures], **options)

    def _checked(self, made: Any, count: int) -> NDArray[np.float32]:
        """[tiles, 3, height, width] of the one prompt."""
        values = np.ascontiguousarray(np.asarray(made["pixel_values"])[0], dtype=np.float32)
        expected = (count, 3, self._tile, self._tile)
        if values.shape != expected:
            raise UserError(
                f"the image processor makes tiles of shape {list(values.shape)}, expected {list(expected)}",
                hint="copy preprocessor_config.json from the checkpoint again",
            )
        return values

    def _picture(
        self,
        values: NDArray[np.float32],
        tiles: tuple[int, int],
        size: tuple[int, int],
        *,
        seconds: float = 0.0,
    ) -> Picture:
        """A picture in `tiles` rows and columns, or seen whole only where they are 0."""
        rows, columns = max(1, tiles[0]), max(1, tiles[1])
        return Picture(
            pixel_values=values,
            grid=(1, rows * self._side, columns * self._side),
            token_grid=(rows * self._along, columns * self._along),
            size=size,
            cells=tile_cells(tiles, self._along) if tiles[0] else None,
            seconds=seconds,
        )

    def _write(self, text: str, groups: Sequence[Parts]) -> str:
        """Every placeholder as words and runs of visual tokens."""
        pieces = re.split(f"({re.escape(_IMAGE)}|{re.escape(_VIDEO)})", text)
        expected = [_IMAGE if parts[0].video is None else _VIDEO for parts in groups]
        if pieces[1::2] != expected:
            found, given = pieces[1::2], expected
            raise UserError(
                f"the rendered prompt places {found.count(_IMAGE)} pictures and {found.count(_VIDEO)} "
                f"videos, {given.count(_IMAGE)} and {given.count(_VIDEO)} were given",
                hint="use the model's published chat template and tokenizer",
            )
        pieces[1::2] = [
            self._picture_text(parts[0]) if parts[0].video is None else self._video_text(parts)
            for parts in groups
        ]
        return "".join(pieces)

    def _expand(self, ids: NDArray[np.int64], groups: Sequence[Parts]) -> NDArray[np.int64]:  # noqa: ARG002
        """Everything was written before it was tokenized."""
        return ids

    def _picture_text(self, picture: Picture) -> str:
        """Tiles by row and column, a line a row, and the picture seen whole."""
        run = _IMAGE * self._along**2
        whole = f"{_AROUND}{_WHOLE}{run}{_AROUND}"
        if picture.cells is None:
            return whole
        rows, columns = (cells // self._along for cells in picture.token_grid)
        lines = (
            "".join(f"{_AROUND}<row_{row}_col_{column}>{run}" for column in range(1, columns + 1))
            for row in range(1, rows + 1)
        )
        return "".join(f"{line}\n" for line in lines) + f"\n{whole}"

    def _video_text(self, frames: Parts) -> str:
        """How many frames of how long a video, and the time before every frame."""
        from transformers.models.smolvlm.processing_smolvlm import (
            DEFAULT_MEDIA_OUTTRO,
            DEFAULT_VIDEO_INTRO,
            FRAME_TIMESTAMP_MESSAGE,
        )

        fps = round(1 / frames[0].seconds, 9)  # what was given: 1 / (1 / 49) is not 49
        length = timedelta(seconds=int(len(frames) / fps))
        text: str = DEFAULT_VIDEO_INTRO.format(
            frame_count=number_words(len(frames)), video_duration=str(length)
        )
        for number, frame in enumerate(frames):
            minutes, seconds = divmod(int(number / fps), 60)
            time = FRAME_TIMESTAMP_MESSAGE.format(timestamp=f"{minutes:02d}:{seconds:02d}")
            text += f"{time}{self._picture_text(frame)}"
        return f"{text}{DEFAULT_MEDIA_OUTTRO}"


def _video_template() -> str:
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    template: str = DEFAULT_CHAT_TEMPLATE
    return template

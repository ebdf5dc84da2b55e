"""Pictures, videos and a question as Video-LLaVA's arrays; without torch."""

from __future__ import annotations

from dataclasses import replace

from ep_export.families.base import Video
from ep_export.families.chat_prompts import Parts
from ep_export.families.llava_prompt import LlavaPrompts

__all__ = ["VideoLlavaPrompts"]


class VideoLlavaPrompts(LlavaPrompts):
    """The prompt builder; see `ep_export.families.chat_prompts.ChatPrompts`.

    A frame is prepared like a picture, by Pillow's bicubic filter; Hugging Face's video processor uses
    torchvision's, which rounds differently in the last of 8 bits. Other than a picture's, a frame's class
    token is a visual token whatever the config says.
    """

    def _process_video(self, video: Video) -> Parts:
        return tuple(
            replace(self._square(frame, with_class=True), encoder="video_encoder", seconds=1 / video.fps)
            for frame in self._frames(video)
        )

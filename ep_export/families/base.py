"""The contract of a model family: what one file under `families/` must answer.

A family knows four things and nothing else: the dimensions in a checkpoint's config, how a prompt with
pictures becomes arrays (NumPy and PIL only: it runs on a Jetson without torch), where the decoder's
modules sit in the Hugging Face model, and how its vision encoder is written so that it can be traced.
torch and transformers' modelling code are imported inside the methods that need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ep_export.dims import DecoderDims
from ep_export.errors import UsageError
from ep_export.vision_flops import VisionCall, VisionTower

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "TYPICAL_PICTURE",
    "DecoderModules",
    "Family",
    "Picture",
    "PromptBuilder",
    "PromptInputs",
    "Turn",
    "Video",
    "VisionTrace",
    "Visual",
]


TYPICAL_PICTURE = (640, 480)
"""(width, height) in pixels of the picture plans assume where none is named, as in most benchmarks."""


@dataclass(frozen=True)
class Video:
    """Frames of a video as they are shown to the model: sampled already.

    Attributes:
        frames: In order, all of one size.
        fps: Frames a second of these frames, not of the file they were sampled from.
    """

    frames: tuple[Image.Image, ...]
    fps: float


Visual: TypeAlias = "Image.Image | Video"
"""What a prompt may hold besides text."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant"; which of them a model takes, its chat template says.
        parts: Text, pictures and videos in order.
    """

    role: str
    parts: tuple[str | Visual, ...]


@dataclass(frozen=True)
class Picture:
    """One picture, or one frame group of a video, after the family's processor: one vision encoder call.

    Attributes:
        pixel_values: What Hugging Face's own image processor returns for this picture alone, float32.
        grid: (time, height, width) in patches, before merging.
        token_grid: (height, width) in cells; every visual token stands for one, row-major as they stand in
            the prompt, unless `cells` says otherwise.
        size: (width, height) of the original picture in pixels.
        cells: [N] int64, the cell every visual token stands for, -1 for one that stands for no place of its
            own (a class token, a newline, the picture seen whole a second time); None where token i is cell
            i.
        view: (left, top, right, bottom) of what the grid lies on, in pixels of the original picture, which
            may be cropped or padded; None where it is all of it.
        video: Which video of the prompt this is a part of, counted from 0; None for a picture. The parts of
            a video follow each other in `PromptInputs.pictures`.
        seconds: Of the video, from this part to the next one; 0 for a picture.
        encoder: The component that encodes it; families with a tower of its own for videos name that.
    """

    pixel_values: NDArray[np.float32]
    grid: tuple[int, int, int]
    token_grid: tuple[int, int]
    size: tuple[int, int]
    cells: NDArray[np.int64] | None = None
    view: tuple[int, int, int, int] | None = None
    video: int | None = None
    seconds: float = 0.0
    encoder: str = "vision_encoder"

    @property
    def visual_tokens(self) -> int:
        """N_i, visual tokens of this picture."""
        height, width = self.token_grid
        return height * width if self.cells is None else self.cells.shape[0]

    def kept_cells(self, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[height * width], true for cells whose token was kept; `kept` has a flag for every token."""
        if self.cells is None:
            return kept
        mask = np.zeros(self.token_grid[0] * self.token_grid[1], dtype=np.bool_)
        mask[self.cells[kept & (self.cells >= 0)]] = True
        return mask


@dataclass(frozen=True)
class PromptInputs:
    """A prompt as arrays: all the runtime, the oracle and the calibrator need. Batch is always 1.

    Attributes:
        input_ids: [1, S] int64, one placeholder id per visual token.
        position_ids: [A, 1, S] int64, computed in NumPy (the oracle lets Hugging Face compute its own).
        visual_index: [N] int64, ascending positions of the visual tokens; empty without a picture.
        next_position: Position id of the first generated token, equal on every axis.
        pictures: One for every call of a vision encoder, in prompt order: pictures, and the parts of videos.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    visual_index: NDArray[np.int64]
    next_position: int
    pictures: tuple[Picture, ...]


class PromptBuilder(Protocol):
    """Turns pictures and a question into `PromptInputs`, and token ids back into text. No torch.

    Attributes:
        eos_token_ids: Ids that end an answer.
        repetition_penalty: What the checkpoint's generation_config.json asks for, greedy or not; 1 is none.
    """

    eos_token_ids: tuple[int, ...]
    repetition_penalty: float

    def build(self, visuals: Sequence[Visual], prompt: str) -> PromptInputs:
        """Apply the chat template with pictures and videos before the question, as Hugging Face would.

        Raises:
            UserError: The prompt is longer than the model's context, or the family takes no videos.
        """
        ...

    def build_chat(self, turns: Sequence[Turn]) -> PromptInputs:
        """Apply the chat template to a conversation whose last turn is to be answered.

        Raises:
            UserError: As `build`, or the chat template has no place for a turn.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens dropped."""
        ...


@dataclass(frozen=True)
class DecoderModules:
    """Where the language decoder's parts sit in the Hugging Face model.

    Attributes:
        embed_tokens: input_ids -> embeddings.
        layers: The decoder layers; `layers[i].self_attn.{q,k,v}_proj` exist.
        norm: Final norm.
        lm_head: hidden -> logits.
        rotary: (hidden, position_ids) -> (cos, sin) as the layers take them; position_ids are [A, B, S], or
            [B, S] where A is 1. It is the module that Hugging Face itself calls.
    """

    embed_tokens: torch.nn.Module
    layers: Sequence[torch.nn.Module]
    norm: torch.nn.Module
    lm_head: torch.nn.Module
    rotary: torch.nn.Module


@dataclass(frozen=True)
class VisionTrace:
    """How the vision encoder is cut for tracing: each distinct block is traced once and stamped.

    The encoder is `stem -> blocks[0] -> ... -> blocks[n-1] -> merger`. Blocks of the same `kind` are the
    same computation with other weights. `carry` values go from the stem to every block unchanged
    (rotary tables, window layout).

    Attributes:
        stem: Module: (*feeds) -> (hidden, *carry).
        blocks: Modules: (hidden, *carry) -> hidden.
        kinds: One label a block, e.g. "window" or "full".
        merger: Module: (hidden, *carry) -> visual_embeds [N, d].
        carry_names: Names of the carry values, for the graph.
        example_feeds: Feeds of a small picture, in the order `stem` takes them, from `vision_feeds`.
        dynamic_axes: feed name -> {axis: symbol} for the axes that change with the picture.
    """

    stem: torch.nn.Module
    blocks: Sequence[torch.nn.Module]
    kinds: Sequence[str]
    merger: torch.nn.Module
    carry_names: Sequence[str]
    example_feeds: Mapping[str, NDArray[Any]]
    dynamic_axes: Mapping[str, Mapping[int, str]]


class Family(ABC):
    """One model family. Instances are stateless; register them in `ep_export.families`."""

    name: str
    model_types: tuple[str, ...]
    verified: str
    """How far this family was verified, as `ep-export models` says it."""

    @abstractmethod
    def dims(self, config: PreTrainedConfig) -> DecoderDims:
        """Dimensions of the decoder.

        Raises:
            UserError: The config asks for something this family's export does not do.
        """

    @abstractmethod
    def vision_tower(self, config: PreTrainedConfig) -> VisionTower:
        """Shape of the vision encoder."""

    @abstractmethod
    def picture_call(
        self, size: tuple[int, int], config: PreTrainedConfig, settings: Mapping[str, Any]
    ) -> VisionCall:
        """What the vision encoder is given for a picture that is alone in its prompt.

        Args:
            size: (width, height) of the picture in pixels.
            config: The model's config.
            settings: Of the checkpoint's image processor; where they say nothing, as published ones do it.
        """

    def video_calls(
        self,
        size: tuple[int, int],  # noqa: ARG002 - few families take no videos
        frames: int,  # noqa: ARG002
        config: PreTrainedConfig,  # noqa: ARG002
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> tuple[VisionCall, ...]:
        """What the vision encoders are given for a video, one a part; arguments as `picture_call`.

        Raises:
            UsageError: The family takes no videos.
        """
        raise UsageError(f"{self.name} takes no videos", hint="leave --frames out")

    def typical_calls(
        self, config: PreTrainedConfig, settings: Mapping[str, Any] | None = None
    ) -> tuple[VisionCall, ...]:
        """What plans assume where no picture is named: a photograph of `TYPICAL_PICTURE`."""
        return (self.picture_call(TYPICAL_PICTURE, config, settings or {}),)

    def default_visual_tokens(self, config: PreTrainedConfig) -> int:
        """Visual tokens of `typical_calls`."""
        return sum(call.visual_tokens for call in self.typical_calls(config))

    @abstractmethod
    def prompt_builder(self, processor: Path, config: PreTrainedConfig) -> PromptBuilder:
        """Prompt builder from a directory with tokenizer and image processor files."""

    @abstractmethod
    def vision_feeds(self, picture: Picture, config: PreTrainedConfig) -> dict[str, NDArray[Any]]:
        """Inputs of the component `picture.encoder` for one picture, by name, in the stem's order."""

    @abstractmethod
    def reference_inputs(self, prompt: PromptInputs, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Keyword arguments for the Hugging Face model's `forward`/`generate`, positions left to it.

        The parts of a video (`Picture.video`) are given to it as the one video they were.
        """

    @abstractmethod
    def decoder(self, model: PreTrainedModel) -> DecoderModules:
        """The decoder's modules in a Hugging Face model of this family (real or on `meta`)."""

    @abstractmethod
    def vision(self, model: PreTrainedModel) -> VisionTrace:
        """The vision encoder, cut for tracing, sharing the model's own parameters."""

    def video(self, model: PreTrainedModel) -> VisionTrace | None:  # noqa: ARG002 - few families have one
        """The encoder of a tower for videos alone (`Picture.encoder` is then "video_encoder"), or None."""
        return None

    def patches_per_token(self, config: PreTrainedConfig) -> int | None:  # noqa: ARG002 - a default
        """Patches that follow each other in the vision encoder and become one visual token of a picture.

        None where tokens are made in another way (newlines between them, scaled features), or where patches
        alone do not say it (a class token that is one).
        """
        return None

    def encoders(self, model: PreTrainedModel) -> dict[str, VisionTrace]:
        """By component name: what encodes pictures, and what encodes videos where that is another tower."""
        video = self.video(model)
        encoders = {"vision_encoder": self.vision(model)}
        return encoders if video is None else {**encoders, "video_encoder": video}

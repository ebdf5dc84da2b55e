"""How large the inputs of the vision encoder get: found by asking the family itself.

Blank pictures of many shapes go through the bundle's own prompt builder, so that every family is asked the
same way and none has to say it twice. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.engine_record import ShapeRange
from ep_export.errors import UserError
from ep_export.families.base import TYPICAL_PICTURE, Video
from ep_export.families.picture_sizes import scaled_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ep_export.families.base import Family, PromptBuilder, Visual

__all__ = ["PictureShapes", "picture_shapes"]

# Sides of pictures as width / height. Processors refuse or squash what is thinner; tiles change with it.
_ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 2.0, 3.0, 4.0, 6.0, 9.0, 16.0, 32.0, 64.0, 128.0)
_COMMON = (
    3.0  # of photographs and screens; thinner pictures may become many more tokens than their pixels say
)
_SMALLEST = 56 * 56
_FRAMES = 3  # an odd number: where frames go in pairs, one is left over
_QUESTION = "?"


@dataclass(frozen=True)
class PictureShapes:
    """What pictures up to a size, and frames of videos, become.

    Attributes:
        inputs: Encoder component -> its inputs' shapes.
        visual_tokens: Of one picture: the fewest, of a typical one, the most of common shapes.
        prompt_tokens: Tokens a prompt has besides, with the shortest question.
    """

    inputs: Mapping[str, Mapping[str, ShapeRange]]
    visual_tokens: tuple[int, int, int]
    prompt_tokens: int


@dataclass(frozen=True)
class _Sample:
    """One picture or video after the family's processor: encoder -> shapes of its inputs, one a call."""

    feeds: Mapping[str, Sequence[Mapping[str, tuple[int, ...]]]]
    visual_tokens: int
    prompt_tokens: int


def picture_shapes(
    family: Family, config: PreTrainedConfig, prompts: PromptBuilder, max_pixels: int
) -> PictureShapes:
    """Shapes of the encoder's inputs over pictures of up to `max_pixels`.

    Args:
        family: The bundle's.
        config: The model's config.
        prompts: The bundle's prompt builder.
        max_pixels: Largest picture, width times height.

    Raises:
        UserError: No picture of that size fits into the model's context.
    """
    from PIL import Image

    typical = scaled_size(TYPICAL_PICTURE, max_pixels)
    sizes = [typical, *_sizes(min(_SMALLEST, max_pixels)), *_sizes(math.prod(typical)), *_sizes(max_pixels)]
    by_size = {
        size: sample
        for size in dict.fromkeys(sizes)
        if (sample := _sample(family, config, prompts, Image.new("RGB", size))) is not None
    }
    samples = list(by_size.values())
    if not samples:
        raise UserError(
            f"no picture of {max_pixels} pixels fits into the model's context", hint="lower --max-pixels"
        )
    # A video's frames are smaller than pictures or go through an encoder of their own: three shapes tell all.
    square = (math.isqrt(max_pixels),) * 2
    videos = [
        Video((Image.new("RGB", size),) * _FRAMES, fps=1.0) for size in (typical, typical[::-1], square)
    ]
    frames = [sample for video in videos if (sample := _sample(family, config, prompts, video))]
    tokens = [
        sample.visual_tokens
        for (width, height), sample in by_size.items()
        if max(width, height) <= _COMMON * min(width, height)
    ] or [sample.visual_tokens for sample in samples]
    return PictureShapes(
        inputs=_inputs([*samples, *frames]),
        visual_tokens=(min(tokens), samples[0].visual_tokens, max(tokens)),
        prompt_tokens=samples[0].prompt_tokens,
    )


def _sample(
    family: Family, config: PreTrainedConfig, prompts: PromptBuilder, visual: Visual
) -> _Sample | None:
    """One picture or video; None where the family refuses it."""
    try:
        prompt = prompts.build([visual], _QUESTION)
    except UserError:  # too thin for the processor, more tokens than the context holds, or no videos here
        return None
    feeds: dict[str, list[Mapping[str, tuple[int, ...]]]] = {}
    for picture in prompt.pictures:
        arrays = family.vision_feeds(picture, config)
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        feeds.setdefault(picture.encoder, []).append(shapes)
    visual_tokens = prompt.visual_index.shape[0]
    return _Sample(feeds, visual_tokens, prompt.input_ids.shape[1] - visual_tokens)


def _inputs(samples: Sequence[_Sample]) -> dict[str, dict[str, ShapeRange]]:
    """Every encoder's inputs over all samples; the first call of the first sample is the typical one."""
    calls: dict[str, list[Mapping[str, tuple[int, ...]]]] = {}
    for sample in samples:
        for encoder, shapes in sample.feeds.items():
            calls.setdefault(encoder, []).extend(shapes)
    return {
        encoder: {name: _range([call[name] for call in every]) for name in every[0]}
        for encoder, every in calls.items()
    }


def _range(shapes: Sequence[tuple[int, ...]]) -> ShapeRange:
    """Elementwise; the first shape is the typical one."""
    columns = list(zip(*shapes, strict=True))
    return ShapeRange(tuple(map(min, columns)), shapes[0], tuple(map(max, columns)))


def _sizes(pixels: int) -> Iterator[tuple[int, int]]:
    """Pictures of that many pixels, wide and high."""
    for aspect in _ASPECTS:
        height = max(1, math.isqrt(int(pixels / aspect)))
        width = max(1, pixels // height)
        yield width, height
        yield height, width

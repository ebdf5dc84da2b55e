"""FLOPs up to the first token of a prompt, which a person waits for: vision encoder and decoder prefill.

A model's numbers and a prompt as it was built, or the size of a picture, enter; counts leave. Nothing is run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ep_export.families.bounds import check_settings
from ep_export.families.picture_sizes import scaled_size
from ep_export.families.processor_files import image_settings, video_settings
from ep_export.planning import Plan, make_plan
from ep_export.policy import Cut, Keep, Schedule
from ep_export.vision_flops import VisionCall, VisionWork

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ep_export.dims import DecoderDims
    from ep_export.families.base import Family, Picture, PromptInputs

__all__ = [
    "Sized",
    "first_token_flops",
    "picture_flops",
    "pixels_within",
    "processor_settings",
    "prompt_plan",
    "tokens_work",
    "typical_work",
    "vision_call",
]


class Sized(Protocol):
    """What is read of a model: `ModelConfig` and `Checkpoint` have it."""

    @property
    def family(self) -> Family:
        """The model family."""
        ...

    @property
    def config(self) -> PreTrainedConfig:
        """The config object of transformers."""
        ...

    @property
    def dims(self) -> DecoderDims:
        """The decoder's dimensions."""
        ...


def first_token_flops(
    model: Sized, prompt: PromptInputs, schedule: Schedule | None = None, keep: Keep | None = None
) -> int:
    """FLOPs up to the first token of a prompt as it was built, with its own pictures in their own sizes.

    Vision encoder (`VisionTower.flops` over `prompt.pictures`) and decoder layers (`layer_flops` of every
    span); a multiply and an add are two. Two ways of answering one question are equally dear where this
    number is the same, whether tokens were pruned or pictures scaled down.

    Args:
        model: `Checkpoint`, `ModelConfig`, or whatever has their family, config and dims.
        prompt: From the family's prompt builder.
        schedule: Where tokens are pruned; None: nowhere.
        keep: How much is kept, as an average over layers; everything when None.

    Raises:
        UsageError: The keep is not within what the schedule can reach.
    """
    return prompt_plan(model, prompt, schedule, keep).first_token.pruned


def processor_settings(model: Sized, directory: Path, *, video: bool = False) -> Mapping[str, Any]:
    """What a checkpoint's own image or video processor is told; nothing where it has no such file.

    Raises:
        UserError: The file is broken, or its sizes are none.
    """
    settings = (video_settings if video else image_settings)(directory)
    # Where pictures are encoded as they are, sizes count the pixels of a whole picture.
    areas = model.family.vision_tower(model.config).tile_side is None
    check_settings(settings, f"the processor's file in {directory}", areas=areas)
    return settings


def typical_work(model: Sized, settings: Mapping[str, Any] | None = None) -> VisionWork:
    """What plans assume where nobody names a picture: see `Family.typical_calls`."""
    calls = model.family.typical_calls(model.config, settings)
    return VisionWork(model.family.vision_tower(model.config), calls)


def tokens_work(model: Sized, visual_tokens: int) -> VisionWork:
    """What so many visual tokens ask of the vision encoder, where no more is known of them.

    Exact where they are those of `Family.typical_calls`. Else one picture about 4 : 3 where resolution is
    dynamic, and as many whole tiles as give the nearest count where it is not.
    """
    tower = model.family.vision_tower(model.config)
    typical = model.family.typical_calls(model.config)
    if visual_tokens == sum(call.visual_tokens for call in typical):
        return VisionWork(tower, typical)
    if tower.tile_side is None:
        side = math.isqrt(tower.joined)
        rows = _rows(visual_tokens)
        call = VisionCall(1, (side * rows, side * max(1, round(visual_tokens / rows))), visual_tokens)
        return VisionWork(tower, (call,))
    whole = tower.tile_side**2 // tower.joined + tower.class_tokens * tower.class_projected
    tiles = max(1, round(visual_tokens / whole))
    return VisionWork(tower, (VisionCall(tiles, (tower.tile_side,) * 2, visual_tokens),))


def picture_flops(
    model: Sized, size: tuple[int, int], *, text_tokens: int, settings: Mapping[str, Any] | None = None
) -> int:
    """FLOPs up to the first token of one picture that is not pruned, before there is a prompt.

    Args:
        model: See `first_token_flops`.
        size: (width, height) of the picture in pixels.
        text_tokens: Prompt tokens that are not visual.
        settings: Of the image processor (`processor_files.image_settings`); published ones when None.
    """
    call = model.family.picture_call(size, model.config, settings or {})
    work = VisionWork(model.family.vision_tower(model.config), (call,))
    return _plan(model, work, text_tokens, None, None).first_token.full


def pixels_within(
    model: Sized,
    size: tuple[int, int],
    flops: int,
    *,
    text_tokens: int,
    settings: Mapping[str, Any] | None = None,
) -> int | None:
    """Pixels to which a picture must be scaled down, its shape kept, so that the first token costs no more.

    With the `first_token_flops` of a pruned prompt as the budget it is the picture that costs what that one
    does. Where resolution is not dynamic (LLaVA-1.5, SmolVLM) a smaller picture costs the same.

    Args:
        model: See `first_token_flops`.
        size: (width, height) of the picture in pixels.
        flops: The budget.
        text_tokens: Prompt tokens that are not visual.
        settings: See `picture_flops`.

    Returns:
        `max_pixels` for `scaled_picture`, at most the picture's own; None where no size is cheap enough.
    """

    def fits(pixels: int) -> bool:
        scaled = scaled_size(size, pixels)
        return picture_flops(model, scaled, text_tokens=text_tokens, settings=settings) <= flops

    low, high = 1, size[0] * size[1]
    if fits(high):
        return high
    if not fits(low):
        return None
    while high - low > 1:  # costs grow with pixels, in steps
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def prompt_plan(
    model: Sized,
    prompt: PromptInputs,
    schedule: Schedule | None = None,
    keep: Keep | None = None,
    *,
    kept: tuple[int, ...] | None = None,
) -> Plan:
    """Budgets of a prompt as it was built; arguments as `first_token_flops`, `kept` as in `make_plan`."""
    work = VisionWork(
        model.family.vision_tower(model.config),
        tuple(vision_call(model, picture) for picture in prompt.pictures),
    )
    text = prompt.input_ids.shape[1] - prompt.visual_index.shape[0]
    return _plan(model, work, text, schedule, keep, kept)


def vision_call(model: Sized, picture: Picture) -> VisionCall:
    """What one picture of a prompt asks of the vision encoder."""
    side = model.family.vision_tower(model.config).tile_side
    if side is None:
        time, height, width = picture.grid
        return VisionCall(time, (height, width), picture.visual_tokens)
    return VisionCall(picture.pixel_values.shape[0], (side, side), picture.visual_tokens)


def _rows(visual_tokens: int) -> int:
    """Rows of a grid about 4 : 3 whose cells come nearest to so many."""
    ideal = max(1, round(math.sqrt(visual_tokens * 3 / 4)))
    near = range(max(1, ideal * 3 // 4), ideal * 5 // 4 + 1)
    return min(
        near, key=lambda rows: (abs(visual_tokens - rows * round(visual_tokens / rows)), abs(rows - ideal))
    )


def _plan(
    model: Sized,
    work: VisionWork,
    text_tokens: int,
    schedule: Schedule | None,
    keep: Keep | None,
    kept: tuple[int, ...] | None = None,
) -> Plan:
    visual = work.visual_tokens
    if keep is not None and keep.tokens is not None and visual:
        keep = Keep(tokens=min(keep.tokens, visual))  # a small picture keeps all it has
    return make_plan(
        model.dims,
        schedule or Schedule((Cut(model.dims.layers - 1),)),  # a cut that keeps everything changes nothing
        keep if schedule and keep else Keep(ratio=1.0),
        visual_tokens=visual,
        text_tokens=text_tokens,
        vision=work,
        kept=kept if schedule else None,
    )

"""Optimisation profiles: which shapes engines are built for.

A bundle and limits enter, one or two `Profile`s a component leave. Head and tail get one profile for prefill
(caches of length 0) and one for decoding (one token, caches of any length): TensorRT then chooses kernels for
each, and reserves no memory for a long prompt upon a long cache, which never happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ep_export.bundle import Bundle, Component, Manifest
from ep_export.checkpoint import open_config
from ep_export.engine.pictures import PictureShapes, picture_shapes
from ep_export.engine_record import Limits, Profile, ShapeRange
from ep_export.errors import UsageError
from ep_export.plan import kept_tokens

if TYPE_CHECKING:
    from ep_export.targets import Target

__all__ = [
    "MAX_NEW_TOKENS",
    "TOP_K_LIMIT",
    "LimitsRequest",
    "Profiles",
    "check_top_k",
    "component_profiles",
    "make_profiles",
    "max_visual_tokens",
    "resolve_limits",
]

Profiles = Mapping[str, tuple[Profile, ...]]
"""Component name -> its profiles, in the order of the engine's profile indices."""

TOP_K_LIMIT = 3840
"""TensorRT's TopK takes a k below this. The plugin has no such limit."""

MAX_NEW_TOKENS = 256
"""Longest answer when nobody says it."""

# 1280 visual tokens of Qwen2.5-VL: the larger of the two bounds its model card suggests.
_MAX_PIXELS = 1280 * 28 * 28
_QUESTION_TOKENS = 512  # room for text beside one picture when nobody says how long prompts get
_TYPICAL_TEXT = 86  # as in plans: about the text of the paper's benchmarks
_ROUND = 256
_PROCESSOR = "processor"


@dataclass(frozen=True)
class LimitsRequest:
    """What a person asked engines to be able to do; None is this module's choice."""

    max_prompt: int | None = None
    max_new_tokens: int | None = None
    max_pixels: int | None = None
    max_kept_tokens: int | None = None


@dataclass(frozen=True)
class _Sizes:
    """(least, typical, most) of a symbol of the interfaces."""

    least: int
    typical: int
    most: int

    def __post_init__(self) -> None:
        if not self.least <= self.typical <= self.most:
            raise AssertionError(f"{self} is out of order")


def resolve_limits(bundle: Bundle, request: LimitsRequest) -> Limits:
    """Fill in what was not asked for, and check that prompts with a picture fit.

    Without `max_prompt` one picture of `max_pixels`, or what plans assume, and a long question fit.

    Raises:
        UsageError: The limits contradict each other or exceed the model's context.
    """
    context = bundle.manifest.dims.max_positions
    max_new = request.max_new_tokens or min(MAX_NEW_TOKENS, context // 4)
    max_pixels = request.max_pixels or _MAX_PIXELS
    pictures = _pictures(bundle.file(_PROCESSOR), max_pixels)
    most = pictures.visual_tokens[2]
    typical = _typical_tokens(bundle.file(_PROCESSOR))
    roomy = -(-(max(most, typical) + _QUESTION_TOKENS) // _ROUND) * _ROUND
    max_prompt = request.max_prompt or min(roomy, context - max_new + 1)
    if max_prompt + max_new - 1 > context:
        raise UsageError(
            f"--max-prompt {max_prompt} and --max-new-tokens {max_new} exceed the context of {context}",
            hint=f"give --max-prompt {max(1, context - max_new + 1)} or less",
        )
    if most + pictures.prompt_tokens > max_prompt:
        raise UsageError(
            f"--max-prompt {max_prompt} is too small for one picture of {max_pixels} pixels: "
            f"{most} visual tokens and {pictures.prompt_tokens} around them",
            hint=f"give --max-prompt {most + pictures.prompt_tokens} or more, or a smaller --max-pixels",
        )
    kept = min(request.max_kept_tokens or max_prompt, max_prompt)
    return Limits(max_prompt, max_new, max_pixels, kept)


def max_visual_tokens(bundle: Bundle, limits: Limits) -> int:
    """Visual tokens of the largest picture."""
    return _pictures(bundle.file(_PROCESSOR), limits.max_pixels).visual_tokens[2]


def check_top_k(limits: Limits, target: Target) -> None:
    """Refuse more kept tokens than TensorRT's TopK takes: where the body of EntropyPrune is compiled.

    Raises:
        UsageError: `max_kept_tokens` is at or above `TOP_K_LIMIT`.
    """
    if limits.max_kept_tokens >= TOP_K_LIMIT:
        raise UsageError(
            f"engines for {target.name} would keep up to {limits.max_kept_tokens} visual tokens, expected "
            f"fewer than {TOP_K_LIMIT}, the limit of TopK in {target.flavour.value}",
            hint=f"give --max-kept-tokens {TOP_K_LIMIT - 1}, or a --max-prompt below {TOP_K_LIMIT}",
        )


def make_profiles(bundle: Bundle, limits: Limits) -> Profiles:
    """Profiles of every component.

    Args:
        bundle: Its manifest has the interfaces, its processor files say what pictures become.
        limits: From `resolve_limits`.

    Raises:
        UserError: The processor files are broken.
    """
    pictures = _pictures(bundle.file(_PROCESSOR), limits.max_pixels)
    return {
        component.name: component_profiles(component, bundle.manifest, limits, pictures)
        for component in bundle.manifest.components
    }


@lru_cache(maxsize=4)  # asked for limits first, for profiles afterwards
def _pictures(processor: Path, max_pixels: int) -> PictureShapes:
    opened = open_config(str(processor))
    prompts = opened.family.prompt_builder(processor, opened.config)
    return picture_shapes(opened.family, opened.config, prompts, max_pixels)


def _typical_tokens(processor: Path) -> int:
    """Visual tokens the family's plans assume: of a whole video where it is made for videos."""
    opened = open_config(str(processor))
    return opened.family.default_visual_tokens(opened.config)


def component_profiles(
    component: Component, manifest: Manifest, limits: Limits, pictures: PictureShapes
) -> tuple[Profile, ...]:
    """Profiles of one component.

    Args:
        component: Its inputs and their symbols: S, M, N, k and P, or those of an encoder.
        manifest: The bundle's.
        limits: From `resolve_limits`.
        pictures: What pictures become.
    """
    if component.name in pictures.inputs:
        return (Profile("all", pictures.inputs[component.name]),)
    visual = min(pictures.visual_tokens[1], limits.max_prompt)
    kept = min(
        limits.max_kept_tokens,
        kept_tokens(
            manifest.keep, layers=manifest.dims.layers, layer=manifest.policy.layer, visual_tokens=visual
        ),
    )
    prompt = min(limits.max_prompt, visual + _TYPICAL_TEXT)
    past = min(limits.max_past, prompt + limits.max_new_tokens // 2)
    one, none = _Sizes(1, 1, 1), _Sizes(0, 0, 0)
    prompts = _Sizes(1, prompt, limits.max_prompt)
    prefill = {
        "S": prompts,
        "M": _Sizes(1, max(1, prompt - visual + kept), limits.max_prompt),
        "N": _Sizes(1, visual, limits.max_prompt),
        "k": _Sizes(1, kept, limits.max_kept_tokens),
        "P": none,
    }
    decode = {"S": one, "M": one, "N": one, "k": one, "P": _Sizes(1, past, limits.max_past)}
    if not any("P" in spec.shape for spec in component.inputs):  # the embedding table
        return (Profile("all", _shapes(component, prefill)),)
    return Profile("prefill", _shapes(component, prefill)), Profile("decode", _shapes(component, decode))


def _shapes(component: Component, sizes: Mapping[str, _Sizes]) -> dict[str, ShapeRange]:
    def bound(shape: tuple[int | str, ...], field: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else getattr(sizes[axis], field) for axis in shape)

    return {
        spec.name: ShapeRange(*(bound(spec.shape, field) for field in ("least", "typical", "most")))
        for spec in component.inputs
    }

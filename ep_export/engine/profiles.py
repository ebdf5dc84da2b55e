"""Optimisation profiles: which shapes engines are built for.

A bundle and limits enter, one or two `Profile`s a component leave. Spans of the decoder get one profile for
prefill (one prompt, caches of length 0) and one for decoding (one token, caches of any length): TensorRT then
chooses kernels for each, and reserves no memory for a long prompt upon a long cache, which never happens.
Caches of fixed capacity have it in both, and decoding takes several answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ep_export.bundle import Bundle, Component, Manifest, Role
from ep_export.checkpoint import open_config
from ep_export.engine.pictures import PictureShapes, picture_shapes
from ep_export.engine_record import Limits, Profile, ShapeRange
from ep_export.errors import UsageError
from ep_export.planning import TEXT_TOKENS, kept_tokens, span_tokens

__all__ = [
    "MAX_BATCH",
    "MAX_NEW_TOKENS",
    "LimitsRequest",
    "Profiles",
    "component_profiles",
    "make_profiles",
    "max_visual_tokens",
    "resolve_limits",
]

Profiles = Mapping[str, tuple[Profile, ...]]
"""Component name -> its profiles, in the order of the engine's profile indices."""

MAX_NEW_TOKENS = 256
"""Longest answer when nobody says it."""

MAX_BATCH = 8
"""Answers that a decode step continues at most, when nobody says it: in caches of fixed capacity."""

# 1280 visual tokens of Qwen2.5-VL: the larger of the two bounds its model card suggests.
_MAX_PIXELS = 1280 * 28 * 28
_QUESTION_TOKENS = 512  # room for text beside one picture when nobody says how long prompts get
_ROUND = 256
_PROCESSOR = "processor"


@dataclass(frozen=True)
class LimitsRequest:
    """What a person asked engines to be able to do; None is this module's choice."""

    max_prompt: int | None = None
    max_new_tokens: int | None = None
    max_pixels: int | None = None
    max_kept_tokens: int | None = None
    max_batch: int | None = None


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
        UserError: The processor files are broken.
        UsageError: The limits contradict each other or exceed the model's context.
    """
    context = bundle.manifest.dims.max_positions
    max_new = request.max_new_tokens or min(MAX_NEW_TOKENS, context // 4)
    max_pixels = request.max_pixels or _MAX_PIXELS
    pictures = _pictures(bundle, max_pixels)
    most = pictures.visual_tokens[2]
    roomy = -(-(max(most, _typical_tokens(bundle)) + _QUESTION_TOKENS) // _ROUND) * _ROUND
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
    # text of any prompt that has the largest picture; where any number is kept, all of a prompt may pass
    behind = min(max_prompt, kept + max_prompt - most) if request.max_kept_tokens else None
    return Limits(max_prompt, max_new, max_pixels, kept, _max_batch(bundle, request), behind)


def _max_batch(bundle: Bundle, request: LimitsRequest) -> int:
    dialect = bundle.manifest.dialect
    if not dialect.fixed_caches and (request.max_batch or 1) > 1:
        raise UsageError(
            f"--max-batch {request.max_batch} needs caches of fixed capacity, and {dialect.value} graphs, "
            "whose caches grow, decode one answer at a time",
            hint="build the bundle with --dialect modern, or leave out --max-batch",
        )
    return request.max_batch or (MAX_BATCH if dialect.fixed_caches else 1)


def max_visual_tokens(bundle: Bundle, limits: Limits) -> int:
    """Visual tokens of the largest picture."""
    return _pictures(bundle, limits.max_pixels).visual_tokens[2]


def make_profiles(bundle: Bundle, limits: Limits) -> Profiles:
    """Profiles of every component.

    Args:
        bundle: Its manifest has the interfaces, its processor files say what pictures become.
        limits: From `resolve_limits`.

    Raises:
        UserError: The processor files are broken.
    """
    pictures = _pictures(bundle, limits.max_pixels)
    return {
        component.name: component_profiles(component, bundle.manifest, limits, pictures)
        for component in bundle.manifest.components
    }


def _pictures(bundle: Bundle, max_pixels: int) -> PictureShapes:
    content = tuple(e.sha256 for e in bundle.manifest.files if e.path.startswith(f"{_PROCESSOR}/"))
    return _picture_shapes(bundle.file(_PROCESSOR), content, max_pixels)


# Limits, profiles and the estimate ask in turn, and an answer takes seconds. A path alone does not say
# whose processor lies there: bundles are overwritten.
@lru_cache(maxsize=4)
def _picture_shapes(processor: Path, _content: tuple[str, ...], max_pixels: int) -> PictureShapes:
    opened = open_config(str(processor))
    prompts = opened.family.prompt_builder(processor, opened.config)
    return picture_shapes(opened.family, opened.config, prompts, max_pixels)


def _typical_tokens(bundle: Bundle) -> int:
    """Visual tokens the family's plans assume: of a whole video where it is made for videos."""
    opened = open_config(str(bundle.file(_PROCESSOR)))
    return opened.family.default_visual_tokens(opened.config)


def component_profiles(
    component: Component, manifest: Manifest, limits: Limits, pictures: PictureShapes
) -> tuple[Profile, ...]:
    """Profiles of one component.

    Args:
        component: Its inputs and their symbols: T and P, or B, T and C, of a span; S, N and k of a prune
            component.
        manifest: The bundle's.
        limits: From `resolve_limits`.
        pictures: What pictures become.
    """
    if component.role is Role.VISION:
        return (Profile("all", pictures.inputs[component.name]),)
    typical = _Typical.of(manifest, limits, pictures)
    limits = limits.at(component, manifest.schedule)
    none, one, batch = _Sizes(0, 0, 0), _Sizes(1, 1, 1), _Sizes(1, limits.max_batch, limits.max_batch)
    if component.role is Role.EMBED:
        sizes = {"S": _Sizes(1, typical.prompt, limits.max_prompt), "B": _Sizes(1, 1, limits.max_batch)}
        return (Profile("all", _shapes(component, sizes)),)
    if component.role is Role.PRUNE:
        return (Profile("prefill", _shapes(component, _prune_sizes(component, limits, typical))),)
    arrives = min(typical.spans[component.layer_range], limits.max_prompt)
    past = min(limits.max_past, arrives + limits.max_new_tokens // 2)
    fixed = _Sizes(limits.capacity, limits.capacity, limits.capacity)
    # a runner takes the first profile that holds, and of one token that has to be decoding
    least = min(2, arrives) if manifest.dialect.fixed_caches else 1
    prefill = {"B": one, "T": _Sizes(least, arrives, limits.max_prompt), "P": none, "C": fixed}
    decode = {"B": batch, "T": one, "P": _Sizes(1, past, limits.max_past), "C": fixed}
    return Profile("prefill", _shapes(component, prefill)), Profile("decode", _shapes(component, decode))


@dataclass(frozen=True)
class _Typical:
    """A prompt with one picture of most benchmarks, pruned as the bundle says: what kernels are chosen for.

    Attributes:
        prompt: Its tokens.
        visual: Visual tokens that arrive at every cut.
        kept: Visual tokens that go on from it.
        spans: Layers -> tokens that arrive at them.
    """

    prompt: int
    visual: tuple[int, ...]
    kept: tuple[int, ...]
    spans: Mapping[range, int]

    @classmethod
    def of(cls, manifest: Manifest, limits: Limits, pictures: PictureShapes) -> _Typical:
        """As the limits allow it."""
        schedule, layers = manifest.schedule, manifest.dims.layers
        visual = min(pictures.visual_tokens[1], limits.max_prompt)
        text = min(limits.max_prompt - visual, TEXT_TOKENS)
        try:
            kept = kept_tokens(manifest.keep.largest, schedule, layers=layers, visual_tokens=visual)
        except UsageError:  # so few tokens that the layers before the first cut have more of this picture
            kept = (1,) * len(schedule.cuts)
        kept = tuple(min(limits.max_kept_tokens, k) for k in kept)
        spans = {span: max(1, seen + text) for span, seen in span_tokens(schedule, layers, visual, kept)}
        return cls(visual + text, (visual, *kept[:-1]), kept, spans)


def _prune_sizes(component: Component, limits: Limits, typical: _Typical) -> dict[str, _Sizes]:
    """Several pictures and videos share a prompt, so as many visual tokens may arrive as it is long."""
    cut = component.cut or 0
    visual, kept = max(1, typical.visual[cut]), max(1, typical.kept[cut])
    most = limits.max_kept_tokens if cut else limits.max_prompt
    arrives = min(visual + typical.prompt - typical.visual[0], limits.max_prompt)
    return {
        "S": _Sizes(1, arrives, limits.max_prompt),
        "N": _Sizes(1, visual, most),
        "k": _Sizes(1, kept, limits.max_kept_tokens),
    }


def _shapes(component: Component, sizes: Mapping[str, _Sizes]) -> dict[str, ShapeRange]:
    def bound(shape: tuple[int | str, ...], field: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else getattr(sizes[axis], field) for axis in shape)

    return {
        spec.name: ShapeRange(*(bound(spec.shape, field) for field in ("least", "typical", "most")))
        for spec in component.inputs
    }

"""Options that several verbs share, so that they mean and read the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ep_export.bundle import Dialect, Precision, WeightsMode
from ep_export.errors import UsageError
from ep_export.numerics import AS_THEY_ARE, DEFAULT_GROUP, GROUPS, WeightKind
from ep_export.policy import ADAPTIVE, DEFAULT_DEGREE, DEGREES, Keep
from ep_export.spelling import parse_share

if TYPE_CHECKING:
    from ep_export.families.base import Visual
    from ep_export.measure.executors import Executor

__all__ = [
    "WEIGHTS",
    "add_options",
    "bundle_argument",
    "executor_from",
    "executor_options",
    "export_options",
    "group_option",
    "image_option",
    "json_option",
    "keep_from",
    "keep_options",
    "model_option",
    "optional_keep",
    "policies_option",
    "values",
    "video_options",
    "visuals_from",
    "weights_options",
]

_F = TypeVar("_F", bound=Callable[..., Any])


def add_options(function: _F, *options: Callable[[_F], _F]) -> _F:
    """Put options on a verb; its help lists them in this order."""
    for option in reversed(options):
        function = option(function)
    return function


def values(kind: type[Any]) -> click.Choice[str]:
    """A click choice over an enum's values."""
    return click.Choice([member.value for member in kind])


model_option = click.option(
    "--model",
    required=True,
    metavar="M",
    help="Alias (see `ep-export models`), hub id, or checkpoint directory.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))

image_option = click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A picture; may repeat, in prompt order.",
)


def video_options(function: _F) -> _F:
    """`--video`, `--frames` and `--fps`."""
    return add_options(
        function,
        click.option(
            "--video",
            "videos",
            type=click.Path(path_type=Path),
            multiple=True,
            help="A video file, an animated GIF or WebP, or a folder of frames; may repeat. Pictures come "
            "first.",
        ),
        click.option(
            "--frames",
            type=click.IntRange(1),
            help="Frames of each video to show at most, evenly sampled [8, or as many as --fps gives].",
        ),
        click.option(
            "--fps",
            type=click.FloatRange(0, min_open=True),
            help="Frames a second to show; of a folder: that its frames were taken at [1].",
        ),
    )


def visuals_from(
    images: Sequence[Path], videos: Sequence[Path], frames: int | None, fps: float | None
) -> list[Visual]:
    """What `--image` and `video_options` collected, opened: pictures first.

    Raises:
        UsageError: Options of videos without one.
        UserError: See `open_picture` and `open_video`.
    """
    from ep_export.runtime import open_picture, open_video

    if (frames is not None or fps is not None) and not videos:
        raise UsageError("--frames and --fps are about videos, and there is none", hint="add --video PATH")
    visuals: list[Visual] = [open_picture(path) for path in images]
    return visuals + [open_video(path, frames=frames, fps=fps) for path in videos]


policies_option = click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="A policy of the bundle (see `ep-export policy list`); once for all cuts, or once a cut.",
)


def executor_options(function: _F) -> _F:
    """`--jobs` and `--ray`."""
    return add_options(
        function,
        click.option(
            "--jobs",
            type=click.IntRange(1),
            metavar="N",
            help="Processes; each holds the model [1; with --ray: what the cluster has room for].",
        ),
        click.option(
            "--ray",
            metavar="ADDRESS",
            help="Measure on this Ray cluster: auto, HOST:PORT, ray://HOST:PORT; local starts one here.",
        ),
    )


def executor_from(jobs: int | None, ray: str | None) -> Executor:
    """What `executor_options` collected."""
    from ep_export.measure.executors import InProcess, Processes

    if ray is not None:
        from ep_export.measure.on_ray import OnRay

        return OnRay(ray, jobs)
    return InProcess() if jobs in {None, 1} else Processes(jobs or 1)


class _AdaptiveShare(float):
    """The average of a keep that every picture has its own of."""


class _Share(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """0.25 or 25%, or adaptive: and either."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        adaptive = text.startswith(f"{ADAPTIVE}:")
        try:
            number = parse_share(text.removeprefix(f"{ADAPTIVE}:"))
        except ValueError:
            self.fail(f"{value!r} is no share: give a number such as 0.25, or 25%", param, ctx)
        return _AdaptiveShare(number) if adaptive else number


def keep_options(required: bool) -> Callable[[_F], _F]:
    """`--keep` and `--keep-tokens`."""
    sense = "Averaged over all layers" + (
        "; one of the two is needed, or --cut." if required else "; default: the bundle's."
    )

    def add(function: _F) -> _F:
        function = click.option(
            "--keep-tokens", type=int, metavar="T", help=f"Visual tokens to keep. {sense}"
        )(function)
        return click.option(
            "--keep",
            type=_Share(),
            metavar="R",
            help=f"Share of the visual tokens to keep, 0 < R <= 1. {sense} adaptive:R lets every picture "
            "keep its own, by the threshold of a calibration record.",
        )(function)

    return add


def keep_from(ratio: float | None, tokens: int | None) -> Keep:
    """`Keep` from the two options, one of which must be there.

    Raises:
        UsageError: Neither or both given, or out of range.
    """
    keep = optional_keep(ratio, tokens)
    if keep is None:
        raise UsageError("how much to keep is not given", hint="add --keep 0.25, or --keep-tokens N")
    return keep


def optional_keep(ratio: float | None, tokens: int | None) -> Keep | None:
    """`Keep` from the two options, None when neither is there.

    Raises:
        UsageError: Both given, or a ratio outside (0, 1], or tokens below 1.
    """
    if ratio is not None and tokens is not None:
        raise UsageError("--keep and --keep-tokens exclude each other", hint="give one of them")
    if ratio is None and tokens is None:
        return None
    if ratio is not None and not (math.isfinite(ratio) and 0 < ratio <= 1):
        raise UsageError(
            f"--keep {ratio:g} is outside 0 < keep <= 1", hint="0.25 keeps a quarter of the visual tokens"
        )
    if tokens is not None and tokens < 1:
        raise UsageError(
            f"--keep-tokens {tokens} is below 1", hint="give the average number of visual tokens to keep"
        )
    if ratio is None:
        return Keep(tokens=tokens)
    return Keep(ratio=float(ratio), adaptive=isinstance(ratio, _AdaptiveShare))


WEIGHTS = (AS_THEY_ARE, *(kind.value for kind in WeightKind))
"""Values of `--weights`."""

group_option = click.option(
    "--group",
    type=click.Choice([str(group) for group in GROUPS]),
    callback=lambda _context, _option, value: int(value),
    default=str(DEFAULT_GROUP),
    show_default=True,
    help="Inputs that share a scale, for --weights int4.",
)


def weights_options(function: _F) -> _F:
    """`--weights`, `--group` and `--vision-weights`."""
    return add_options(
        function,
        click.option(
            "--weights",
            type=click.Choice(WEIGHTS),
            default="none",
            show_default=True,
            help="Store the decoder's linear layers in fewer bits; calibrated on --images where given.",
        ),
        group_option,
        click.option(
            "--vision-weights",
            type=click.Choice((AS_THEY_ARE, WeightKind.INT8.value)),
            default=AS_THEY_ARE,
            show_default=True,
            help="Store the vision encoder's linear layers in 8 bits, beside --weights.",
        ),
    )


def export_options(function: _F) -> _F:
    """How the graphs are written."""
    function = weights_options(function)
    return add_options(
        function,
        click.option(
            "--dialect",
            type=values(Dialect),
            default=Dialect.ONNXRUNTIME.value,
            show_default=True,
            help="onnxruntime: its fused operators, many requests at once. portable: opset 20, TensorRT "
            "10.3 up. modern: opset 24, many requests at once, TensorRT 10.15 up.",
        ),
        click.option(
            "--precision",
            type=values(Precision),
            default=Precision.FP32.value,
            show_default=True,
            help="Arithmetic of the graphs; fp32 for a CPU, bf16 or fp16 for a GPU.",
        ),
        click.option(
            "--shards",
            type=values(WeightsMode),
            default=WeightsMode.LINK.value,
            show_default=True,
            help="Hard-link the checkpoint's shards into the bundle, or copy them.",
        ),
        click.option(
            "--degree",
            type=click.Choice([str(degree) for degree in DEGREES]),
            callback=lambda _context, _option, value: int(value),
            default=str(DEFAULT_DEGREE),
            show_default=True,
            help="Degree of the entropy series; twice the degree, half the error.",
        ),
        click.option("--out", type=click.Path(path_type=Path), help="Bundle to write [./<model>-ep]."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
    )

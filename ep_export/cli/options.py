"""Options that several verbs share, so that they mean and read the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ep_export.bundle import Dialect, Precision, WeightsMode
from ep_export.errors import UsageError
from ep_export.policy import DEFAULT_DEGREE, DEGREES, Budget, Keep, Select, Source

__all__ = [
    "bundle_argument",
    "export_options",
    "image_option",
    "json_option",
    "keep_from",
    "keep_options",
    "model_option",
    "optional_keep",
    "policy_options",
    "values",
]

_F = TypeVar("_F", bound=Callable[..., Any])


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


def keep_options(required: bool) -> Callable[[_F], _F]:
    """`--keep` and `--keep-tokens`."""
    sense = "Averaged over all layers" + (
        "; one of the two is needed." if required else "; default: the bundle's."
    )

    def add(function: _F) -> _F:
        function = click.option(
            "--keep-tokens", type=int, metavar="T", help=f"Visual tokens to keep. {sense}"
        )(function)
        return click.option(
            "--keep", type=float, metavar="R", help=f"Share of the visual tokens to keep, 0 < R <= 1. {sense}"
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
    return Keep(ratio=ratio, tokens=tokens)


def policy_options(function: _F) -> _F:
    """Where and how to prune, and the evidence for it."""
    for option in reversed(
        (
            click.option(
                "--layer", type=int, metavar="K", help="Prune after layer K-1 instead of asking the evidence."
            ),
            click.option(
                "--policy",
                "policy_name",
                type=click.Choice(["auto", "paper", "released", "order2", "norm"]),
                default="auto",
                show_default=True,
                help="Token score. auto: what the record or the calibration recommends.",
            ),
            click.option(
                "--select", type=values(Select), help="Keep the highest or the lowest scores [highest]."
            ),
            click.option(
                "--source", type=values(Source), help="States of layer K-1 that are scored [query]."
            ),
            click.option(
                "--budget",
                type=values(Budget),
                default=Budget.JOINT.value,
                show_default=True,
                help="Several pictures share one budget, or each keeps its share.",
            ),
            click.option(
                "--calibration",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="A record made by `ep-export calibrate`.",
            ),
        )
    ):
        function = option(function)
    return function


def export_options(function: _F) -> _F:
    """How the graphs are written."""
    for option in reversed(
        (
            click.option(
                "--dialect",
                type=values(Dialect),
                default=Dialect.PORTABLE.value,
                show_default=True,
                help="portable: opset 20, TensorRT 10.3 up. modern: opset 23, TensorRT 10.15 up.",
            ),
            click.option(
                "--precision",
                type=values(Precision),
                default=Precision.FP32.value,
                show_default=True,
                help="Arithmetic of the graphs; fp32 for a CPU, bf16 or fp16 for a GPU.",
            ),
            click.option(
                "--weights",
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
    ):
        function = option(function)
    return function

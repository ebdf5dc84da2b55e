"""`ep-export plan`: budgets, FLOPs and KV cache, from the config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ep_export.cli.console import note, print_json, print_table
from ep_export.cli.options import json_option, keep_from, keep_options, model_option, policy_options

if TYPE_CHECKING:
    from ep_export.plan import Plan

__all__ = ["plan", "plan_json", "plan_rows"]

_BYTES_PER_ELEMENT = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@click.command()
@model_option
@keep_options(required=True)
@policy_options
@click.option(
    "--visual-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Visual tokens of a prompt [a typical picture].",
)
@click.option(
    "--text-tokens",
    type=click.IntRange(0),
    default=86,
    show_default=True,
    metavar="T",
    help="Text tokens of a prompt.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(sorted(_BYTES_PER_ELEMENT)),
    default="fp16",
    show_default=True,
    help="KV cache type.",
)
@click.option(
    "--target",
    "target_name",
    metavar="T",
    help="Also: does it fit, and how fast could it be, on this device.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="T",
    help="Length of an answer, for --target.",
)
@json_option
def plan(
    model: str,
    keep: float | None,
    keep_tokens: int | None,
    visual_tokens: int | None,
    text_tokens: int,
    kv_dtype: str,
    target_name: str | None,
    new_tokens: int,
    as_json: bool,
    **policy_choice: Any,
) -> None:
    """Show what pruning saves, from the config alone."""
    from ep_export.calibrate.choose import resolve_policy
    from ep_export.checkpoint import open_config
    from ep_export.cli.choice import policy_request
    from ep_export.cli.fit import fit_json, print_fit
    from ep_export.fit import estimate, vision_size
    from ep_export.plan import make_plan
    from ep_export.targets import find_target

    wanted = keep_from(keep, keep_tokens)
    config = open_config(model)
    policy, evidence = resolve_policy(config, policy_request(policy_choice))
    made = make_plan(
        config.dims,
        policy,
        wanted,
        visual_tokens=visual_tokens or config.family.default_visual_tokens(config.config),
        text_tokens=text_tokens,
        kv_bytes_per_element=_BYTES_PER_ELEMENT[kv_dtype],
    )
    target = find_target(target_name) if target_name else None
    guess = estimate(made, target, vision_size(config.config), new_tokens=new_tokens) if target else None
    if as_json:
        fit = {"target": None if guess is None else fit_json(guess)} if target else {}
        print_json({**plan_json(made), **fit})
        return
    print_table(f"{model}, keep {wanted}", ("", "full", "pruned", "saved"), plan_rows(made, kv_dtype))
    if target:
        print_fit(target, guess)
    note(f"policy: {policy} ({evidence.summary})")


def plan_rows(made: Plan, kv_dtype: str) -> list[tuple[str, str, str, str]]:
    """The plan as table rows: quantity, full, pruned, saved."""
    flops, kv = made.prefill_flops, made.visual_kv_bytes
    layer, layers = made.policy.layer, made.dims.layers
    return [
        (f"visual tokens, layers 0..{layer - 1}", str(made.visual_tokens), str(made.visual_tokens), ""),
        (
            f"visual tokens, layers {layer}..{layers - 1}",
            str(made.visual_tokens),
            str(made.kept_visual_tokens),
            _saved(made.visual_tokens, made.kept_visual_tokens),
        ),
        ("text tokens", str(made.text_tokens), str(made.text_tokens), ""),
        ("decoder prefill", _flops(flops.full), _flops(flops.pruned), _saved(flops.full, flops.pruned)),
        (
            f"KV cache of visual tokens, {kv_dtype}",
            _mib(kv.full),
            _mib(kv.pruned),
            _saved(kv.full, kv.pruned),
        ),
    ]


def plan_json(made: Plan) -> dict[str, Any]:
    """The plan under the names that scripts rely on."""
    return {
        "layers": made.dims.layers,
        "ecl": made.policy.layer,
        "policy": made.policy,
        "visual_tokens": made.visual_tokens,
        "text_tokens": made.text_tokens,
        "keep": made.keep.ratio
        if made.keep.ratio is not None
        else (made.keep.tokens or 0) / made.visual_tokens,
        "kept_visual_tokens": made.kept_visual_tokens,
        "prefill_flops": made.prefill_flops,
        "visual_kv_bytes": made.visual_kv_bytes,
    }


def _saved(full: float, pruned: float) -> str:
    return f"{1 - pruned / full:.1%}"


def _flops(count: float) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e6:.2f} MFLOP"


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"

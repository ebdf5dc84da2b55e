"""`ep-export plan`: budgets, FLOPs and KV cache, from the config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ep_export.cli.console import note, print_json, print_table
from ep_export.cli.options import (
    json_option,
    keep_options,
    model_option,
    optional_keep,
    weights_from,
    weights_options,
)
from ep_export.cli.schedule import schedule_options, schedule_request
from ep_export.documents import encode
from ep_export.plan import span_tokens

if TYPE_CHECKING:
    from ep_export.plan import Plan

__all__ = ["plan", "plan_json", "plan_rows"]

_BYTES_PER_ELEMENT = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@click.command()
@model_option
@keep_options(required=True)
@schedule_options
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
@weights_options
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
    weights: str,
    group: int,
    as_json: bool,
    **schedule_choice: Any,
) -> None:
    """Show what pruning saves, from the config alone."""
    from ep_export.calibrate.choose import resolve_schedule
    from ep_export.checkpoint import open_config
    from ep_export.cli.fit import plan_fit_json, print_fit
    from ep_export.fit import estimate, vision_size
    from ep_export.plan import make_plan, settled_keep
    from ep_export.targets import find_target

    told = optional_keep(keep, keep_tokens)
    target = find_target(target_name) if target_name else None
    config = open_config(model)
    schedule, evidence = resolve_schedule(config, schedule_request(schedule_choice))
    planned = make_plan(
        config.dims,
        schedule,
        settled_keep(told, schedule, layers=config.dims.layers),
        visual_tokens=visual_tokens or config.family.default_visual_tokens(config.config),
        text_tokens=text_tokens,
        kv_bytes_per_element=_BYTES_PER_ELEMENT[kv_dtype],
    )
    stored = weights_from(weights, group)
    if config.published is not None:
        stored = config.published.weights
    vision = vision_size(config.config)
    guess = estimate(planned, target, vision, new_tokens=new_tokens, weights=stored) if target else None
    if as_json:
        fit = plan_fit_json(guess) if target else {}
        print_json({**plan_json(planned), **fit})
        return
    print_table(
        f"{model}, keep {planned.keep}", ("", "full", "pruned", "saved"), plan_rows(planned, kv_dtype)
    )
    if target:
        print_fit(target, guess)
    note(f"schedule: {schedule} ({evidence.summary})")


def plan_rows(plan: Plan, kv_dtype: str) -> list[tuple[str, str, str, str]]:
    """The plan as table rows: quantity, full, pruned, saved."""
    flops, kv, full = plan.prefill_flops, plan.visual_kv_bytes, plan.visual_tokens
    spans = span_tokens(plan.schedule, plan.dims.layers, full, plan.kept_visual_tokens)
    return [
        *(
            (
                f"visual tokens, layers {span.start}..{span.stop - 1}",
                str(full),
                str(visual),
                _saved(full, visual) if visual < full else "",
            )
            for span, visual in spans
        ),
        ("text tokens", str(plan.text_tokens), str(plan.text_tokens), ""),
        ("decoder prefill", _flops(flops.full), _flops(flops.pruned), _saved(flops.full, flops.pruned)),
        (
            f"KV cache of visual tokens, {kv_dtype}",
            _mib(kv.full),
            _mib(kv.pruned),
            _saved(kv.full, kv.pruned),
        ),
    ]


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan under the names that scripts rely on; `ecl` and `policy` are those of the first cut."""
    cuts = plan.schedule.cuts
    return {
        "layers": plan.dims.layers,
        "ecl": cuts[0].layer,
        "policy": {"layer": cuts[0].layer, **encode(cuts[0].chooser)},
        "cuts": [
            {"layer": cut.layer, "policy": cut.chooser.name, "share": cut.share, "kept_visual_tokens": kept}
            for cut, kept in zip(cuts, plan.kept_visual_tokens, strict=True)
        ],
        "visual_tokens": plan.visual_tokens,
        "text_tokens": plan.text_tokens,
        "keep": plan.keep.ratio
        if plan.keep.ratio is not None
        else (plan.keep.tokens or 0) / plan.visual_tokens,
        "kept_visual_tokens": plan.kept_visual_tokens[-1],
        "prefill_flops": plan.prefill_flops,
        "visual_kv_bytes": plan.visual_kv_bytes,
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

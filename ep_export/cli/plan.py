"""`ep-export plan`: what a keep saves up to the first token and in memory, from the config alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ep_export.cli.console import note, print_json, print_table
from ep_export.cli.first_token import (
    budget_options,
    first_token_budget,
    picture_options,
    picture_work,
    print_proposals,
    proposals_json,
)
from ep_export.cli.options import (
    json_option,
    keep_options,
    model_option,
    optional_keep,
    weights_options,
)
from ep_export.cli.schedule import schedule_options, schedule_request
from ep_export.cli.units import bytes_text, flops_text, keep_text, percent_text
from ep_export.documents import encode
from ep_export.errors import UserError
from ep_export.numerics import TYPES, rounded_to
from ep_export.planning import TEXT_TOKENS, span_tokens

if TYPE_CHECKING:
    from ep_export.checkpoint import ModelConfig
    from ep_export.numerics import Weights
    from ep_export.planning import Plan
    from ep_export.targets import Target

__all__ = ["keep_sentence", "plan", "plan_json", "plan_rows", "stored_bytes"]

_BYTES_PER_ELEMENT = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@click.command()
@model_option
@keep_options(required=True)
@schedule_options
@picture_options
@click.option(
    "--text-tokens",
    type=click.IntRange(0),
    default=TEXT_TOKENS,
    show_default=True,
    metavar="T",
    help="Text tokens of a prompt.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(sorted(_BYTES_PER_ELEMENT)),
    help="KV cache type [what the target's graphs compute in, else fp16].",
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
@budget_options
@weights_options
@json_option
def plan(
    model: str,
    keep: float | None,
    keep_tokens: int | None,
    text_tokens: int,
    kv_dtype: str | None,
    target_name: str | None,
    new_tokens: int,
    weights: str,
    group: int,
    vision_weights: str,
    as_json: bool,
    **more: Any,
) -> None:
    """Show what pruning saves up to the first token and in memory, from the config alone."""
    from ep_export.calibrate.choose import settle
    from ep_export.checkpoint import open_config
    from ep_export.cli.fit import plan_fit_json, print_fit
    from ep_export.fit import estimate
    from ep_export.targets import find_target
    from ep_export.what_fits import suggest

    target = find_target(target_name) if target_name else None
    config = open_config(model)
    settled = settle(config, schedule_request(more), keep=optional_keep(keep, keep_tokens))
    schedule = settled.schedule
    stored = config.published.weights if config.published else rounded_to(weights, group, vision_weights)
    _check_weights(stored, target)
    kv_dtype = kv_dtype or (target.graphs[0].precision.value if target else "fp16")
    kv_bytes = _BYTES_PER_ELEMENT[kv_dtype]

    work, shown = picture_work(config, model, more)
    budget = first_token_budget(more, target, new_tokens=new_tokens, weights=stored, kv_bytes=kv_bytes)
    proposals = budget.proposals(config, model, schedule, text_tokens, more) if budget else ()
    if budget and settled.keep is None and all(cut.share is None for cut in schedule.cuts):
        best = budget.best(proposals)
        settled = replace(settled, keep=best.plan.keep)
        work, shown = best.plan.vision or work, budget.picture(best)
    planned = settled.plan(work, text_tokens=text_tokens, kv_bytes_per_element=kv_bytes)
    guess = None
    if target:
        guess = estimate(
            planned, target, new_tokens=new_tokens, weights=stored, kv_bytes_per_element=kv_bytes
        )
    suggestions = None
    if target and guess and not guess.fits(guess.pruned):
        suggestions = suggest(
            config,
            planned,
            target,
            new_tokens=new_tokens,
            weights=stored,
            shown=lambda other: picture_work(other, other.source, more)[0],
        )
    number_type, size = stored_bytes(config, stored, target)
    if as_json:
        fit = plan_fit_json(guess, suggestions) if target else {}
        trade = proposals_json(budget, proposals) if budget else {}
        print_json({**plan_json(planned), "weights_bytes": size, **fit, **trade})
        return
    title = f"{model}, keep {planned.keep}: {shown}, {text_tokens} text tokens"
    rows = [
        *plan_rows(planned, kv_dtype),
        (f"weights as stored, {number_type}", bytes_text(size), bytes_text(size), ""),
    ]
    print_table(title, ("", "full", "pruned", "saved"), rows)
    if target:
        print_fit(target, guess, suggestions, weights=number_type)
    if budget:
        print_proposals(budget, proposals)
    note(f"kept: {keep_sentence(planned)}")
    note(f"schedule: {schedule} ({settled.evidence.summary})")


def plan_rows(plan: Plan, kv_dtype: str) -> list[tuple[str, str, str, str]]:
    """The plan as table rows: quantity, full, pruned, saved; what a person waits for comes first."""
    flops, kv, full = plan.prefill_flops, plan.visual_kv_bytes, plan.visual_tokens
    spans = span_tokens(plan.schedule, plan.dims.layers, full, plan.kept_visual_tokens)
    decoder = ("decoder prefill", flops_text(flops.full), flops_text(flops.pruned), _saved(flops))
    rows = [decoder]
    if plan.vision:
        first, vision = plan.first_token, flops_text(plan.vision_flops)
        rows = [
            ("to the first token", flops_text(first.full), flops_text(first.pruned), _saved(first)),
            ("  vision encoder", vision, vision, ""),
            (f"  {decoder[0]}", *decoder[1:]),
        ]
    rows += [
        (
            f"visual tokens, layers {span.start}..{span.stop - 1}",
            str(full),
            str(visual),
            percent_text(1 - visual / full) if visual < full else "",
        )
        for span, visual in spans
    ]
    return [
        *rows,
        ("text tokens", str(plan.text_tokens), str(plan.text_tokens), ""),
        (
            f"KV cache of visual tokens, all layers, {kv_dtype}",
            bytes_text(kv.full),
            bytes_text(kv.pruned),
            _saved(kv),
        ),
    ]


def keep_sentence(plan: Plan) -> str:
    """`87 of 391 visual tokens: 22 % after layer 1 = 25 % on average`: what the two percentages are of."""
    visual = plan.visual_tokens
    if not visual:
        return "no visual tokens"
    cuts = list(zip(plan.schedule.cuts, plan.kept_visual_tokens, strict=True))
    shares = [(cut.layer, kept / visual) for cut, kept in cuts]
    counts = ", then ".join(str(kept) for _, kept in cuts)
    average = keep_text(shares, plan.average_kept)
    return f"{counts} of {visual} visual tokens: {average} over {plan.dims.layers} layers"


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
        "average_kept": plan.average_kept,
        "vision_flops": plan.vision_flops,
        "prefill_flops": plan.prefill_flops,
        "first_token": plan.first_token,
        "visual_kv_bytes": plan.visual_kv_bytes,
    }


def stored_bytes(config: ModelConfig, weights: Weights | None, target: Target | None) -> tuple[str, int]:
    """What weights are stored in and how many bytes they are, on disk: a tied table counts once."""
    from ep_export.weight_sizes import weight_sizes

    if target:
        name, size = target.graphs[0].precision.value, _BYTES_PER_ELEMENT[target.graphs[0].precision.value]
    else:
        name = str(config.config.dtype or "float16").removeprefix("torch.")
        size = TYPES[name].bits // 8 if name in TYPES else _BYTES_PER_ELEMENT["fp16"]
    sizes = weight_sizes(
        config.dims,
        config.family.vision_tower(config.config),
        number_bytes=size,
        weights=weights,
        tied=bool(getattr(config.config, "tie_word_embeddings", False)),
    )
    return (f"{weights.kind.value} and {name}" if weights else name), sizes.stored


def _check_weights(weights: Weights | None, target: Target | None) -> None:
    if target and not target.takes_weights(weights) and weights:
        raise UserError(
            f"{target.name} takes no {weights.kind.value} weights",
            hint=f"it takes {', '.join(target.weights)} (see `ep-export targets`)",
        )


def _saved(pair: Any) -> str:
    return percent_text(1 - pair.pruned / pair.full)

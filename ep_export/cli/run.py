"""`ep-export run`: ask a bundle about pictures, with ONNX Runtime and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ep_export.bundle import Bundle
from ep_export.cli.console import note, print_json
from ep_export.cli.options import bundle_argument, json_option, keep_options, optional_keep
from ep_export.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.bundle import Manifest
    from ep_export.runtime import Generation

__all__ = ["run"]


@click.command()
@bundle_argument
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A picture; may repeat, in prompt order.",
)
@click.option("--prompt", required=True, help="The question.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@keep_options(required=False)
@click.option(
    "--temperature", type=click.FloatRange(0, min_open=True), help="Sample at this temperature [greedy]."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most likely tokens of this mass.",
)
@click.option("--top-k", type=click.IntRange(1), help="Sample from this many most likely tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampler.")
@click.option(
    "--show",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Draw which patches of the first picture were kept.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads [all].")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compute every checksum before use."
)
@json_option
def run(
    bundle: Path,
    images: Sequence[Path],
    prompt: str,
    max_new_tokens: int,
    keep: float | None,
    keep_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    show: Path | None,
    threads: int | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Answer a question about pictures from a bundle."""
    from ep_export.runtime import Sampling, Session, open_picture

    if show and not images:
        raise UsageError(
            "--show draws the kept patches of a picture, and there is none", hint="add --image FILE"
        )
    wanted = optional_keep(keep, keep_tokens)
    pictures = [open_picture(path) for path in images]
    sampling = None
    if temperature is not None or top_p is not None or top_k is not None:
        sampling = Sampling(temperature=temperature or 1.0, top_p=top_p or 1.0, top_k=top_k or 0, seed=seed)
    opened = Bundle.open(bundle, verify=verify)
    with Session.open(opened, threads=threads) as session:
        answer = session.generate(
            pictures, prompt, max_new_tokens=max_new_tokens, keep=wanted, sampling=sampling
        )
    if show:
        _draw(show, pictures[0], answer)
    if as_json:
        print_json(answer)
        return
    click.echo(answer.answer)
    _footnotes(opened.manifest, answer, show)


def _draw(path: Path, picture: Image.Image, answer: Generation) -> None:
    from ep_export.validate.picture import draw_kept

    path.parent.mkdir(parents=True, exist_ok=True)
    first = answer.pictures[0]
    draw_kept(picture, first.token_grid, first.kept, view=first.view).save(path)


def _footnotes(manifest: Manifest, answer: Generation, show: Path | None) -> None:
    """What pruning did to this prompt, on stderr."""
    from ep_export.plan import make_plan

    dims, policy = manifest.dims, manifest.policy
    if answer.visual_tokens:
        text_tokens = answer.prompt_tokens - answer.visual_tokens
        plan = make_plan(
            dims,
            policy,
            answer.keep,
            visual_tokens=answer.visual_tokens,
            text_tokens=text_tokens,
        )
        flops = 1 - plan.prefill_flops.pruned / plan.prefill_flops.full
        kv = 1 - plan.visual_kv_bytes.pruned / plan.visual_kv_bytes.full
        kept = f"kept {plan.kept_visual_tokens} of {plan.visual_tokens} visual tokens"
        where = f"from layer {policy.layer} of {dims.layers} on"
        note(f"{kept} {where}: {flops:.0%} fewer decoder prefill FLOPs, {kv:.0%} less visual KV cache")
    total, decode = answer.timings_ms["total"], answer.timings_ms["decode_per_token"]
    note(f"{len(answer.token_ids)} tokens in {total:.0f} ms ({decode:.1f} ms a decoded token)")
    if show:
        note(f"kept patches drawn in {show}")

"""`ep-export run`: ask a bundle about pictures and videos, with ONNX Runtime and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ep_export.bundle import Bundle
from ep_export.cli.console import note, print_json
from ep_export.cli.options import (
    bundle_argument,
    image_option,
    json_option,
    keep_options,
    optional_keep,
    policies_option,
)
from ep_export.cli.runtime import backend_sentence, open_backend, runtime_options
from ep_export.errors import UsageError
from ep_export.plan import check_schedule
from ep_export.policy import Keep

if TYPE_CHECKING:
    from ep_export.bundle import Manifest
    from ep_export.families.base import Visual
    from ep_export.runtime import Generation

__all__ = ["run"]


@click.command()
@bundle_argument
@image_option
@click.option(
    "--video",
    "videos",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A video file, an animated GIF or WebP, or a folder of frames; may repeat. Pictures come first.",
)
@click.option(
    "--frames",
    type=click.IntRange(1),
    help="Frames of each video to show at most, evenly sampled [8, or as many as --fps gives].",
)
@click.option(
    "--fps",
    type=click.FloatRange(0, min_open=True),
    help="Frames a second to show; of a folder: that its frames were taken at [1].",
)
@click.option("--prompt", required=True, help="The question.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@keep_options(required=False)
@policies_option
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
    help="Draw which patches of every picture and video go on: a row each, a column a cut.",
)
@runtime_options
@json_option
def run(
    bundle: Path,
    images: Sequence[Path],
    videos: Sequence[Path],
    frames: int | None,
    fps: float | None,
    prompt: str,
    max_new_tokens: int,
    keep: float | None,
    keep_tokens: int | None,
    policies: Sequence[str],
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    show: Path | None,
    as_json: bool,
    **backend_options: Any,
) -> None:
    """Answer a question about pictures and videos from a bundle."""
    from ep_export.cli.drawing import draw_answer
    from ep_export.runtime import Sampling, Session, open_picture, open_video

    if show and not (images or videos):
        raise UsageError(
            "--show draws the kept patches of a picture, and there is none", hint="add --image FILE"
        )
    if (frames is not None or fps is not None) and not videos:
        raise UsageError("--frames and --fps are about videos, and there is none", hint="add --video PATH")
    if show:
        _check_drawing(show)
    wanted = optional_keep(keep, keep_tokens)
    visuals: list[Visual] = [open_picture(path) for path in images]
    visuals += [open_video(path, frames=frames, fps=fps) for path in videos]
    sampling = None
    if temperature is not None or top_p is not None or top_k is not None:
        sampling = Sampling(temperature=temperature or 1.0, top_p=top_p or 1.0, top_k=top_k or 0, seed=seed)
    opened = Bundle.open(bundle, verify=backend_options["verify"])
    # refused before components are opened
    check_schedule(opened.manifest.scheduled(policies), opened.manifest.dims.layers)
    backend = open_backend(opened, **backend_options)
    with Session.open(opened, runner=backend) as session:
        answer = session.generate(
            visuals,
            prompt,
            max_new_tokens=max_new_tokens,
            keep=wanted,
            policies=policies,
            sampling=sampling,
        )
    if show:
        draw_answer(visuals, answer).save(show)
    if sentence := backend_sentence(backend):
        note(sentence)
    numerics = opened.manifest.numerics
    if numerics and numerics.weights and backend_options["runtime"] == "onnxruntime":
        how = "as they are (--exact)" if backend_options["exact"] else "rounded to 8 bits (else: --exact)"
        note(f"{numerics.weights.kind.value} weights are multiplied by activations {how}")
    if as_json:
        print_json(answer)
        return
    click.echo(answer.answer)
    _footnotes(opened.manifest, answer, show)


def _check_drawing(path: Path) -> None:
    """Refuse a drawing that could not be written, before anything is answered."""
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"--show {path} has no ending of a picture", hint="give a name that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)


def _footnotes(manifest: Manifest, answer: Generation, show: Path | None) -> None:
    """What pruning did to this prompt, on stderr."""
    if answer.cuts:
        note(_pruned(manifest, answer))
    total, count = answer.timings_ms["total"], len(answer.token_ids)
    if count > 1:
        decode = answer.timings_ms["decode_per_token"]
        note(f"{count} tokens in {total:.0f} ms ({decode:.1f} ms a decoded token)")
    else:
        note(f"1 token in {total:.0f} ms")
    if show:
        note(f"kept patches drawn in {show}")


def _pruned(manifest: Manifest, answer: Generation) -> str:
    """`kept 15 of 154 visual tokens from layer 2 of 12 on (10 % there = 25 % on average): ...`."""
    from ep_export.plan import make_plan, span_tokens

    dims, visual = manifest.dims, answer.visual_tokens
    text_tokens = answer.prompt_tokens - visual
    schedule = manifest.scheduled(answer.policies)
    keep = _at_most(answer.keep, visual)
    plan = make_plan(dims, schedule, keep, visual_tokens=visual, text_tokens=text_tokens)
    kept = [len(cut.kept_index) - text_tokens for cut in answer.cuts]
    average = sum(len(span) * count for span, count in span_tokens(schedule, dims.layers, visual, kept))
    clauses = [
        f"{count} from layer {cut.layer} on ({count / visual:.0%} there)"
        for cut, count in zip(answer.cuts, kept, strict=True)
    ]
    clauses[0] = (
        f"kept {kept[0]} of {visual} visual tokens from layer {answer.cuts[0].layer} of {dims.layers} on "
        f"({kept[0] / visual:.0%} there)"
    )
    where = ", ".join(clauses).removesuffix(")") + f" = {average / visual / dims.layers:.0%} on average)"
    flops = 1 - plan.prefill_flops.pruned / plan.prefill_flops.full
    kv = 1 - plan.visual_kv_bytes.pruned / plan.visual_kv_bytes.full
    saved = f"{where}: {flops:.0%} fewer decoder prefill FLOPs, {kv:.0%} less visual KV cache"
    return saved.replace("%", " %")


def _at_most(keep: Keep, visual_tokens: int) -> Keep:
    """Where a picture has fewer tokens than were asked for, all of them are kept."""
    return keep if keep.tokens is None else Keep(tokens=min(keep.tokens, visual_tokens))

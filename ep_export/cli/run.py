"""`ep-export run`: ask a bundle about pictures and videos, with ONNX Runtime and no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    video_options,
    visuals_from,
)
from ep_export.cli.runtime import backend_sentence, open_backend, runtime_options
from ep_export.cli.units import ms_text, percent_text
from ep_export.errors import UsageError
from ep_export.planning import check_schedule

if TYPE_CHECKING:
    from ep_export.bundle import Manifest
    from ep_export.runtime import Generation

__all__ = ["run"]


@click.command()
@bundle_argument
@image_option
@video_options
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
    from ep_export.runtime import Sampling, Session

    if show and not (images or videos):
        raise UsageError(
            "--show draws the kept patches of a picture, and there is none", hint="add --image FILE"
        )
    if show:
        _check_drawing(show)
    wanted = optional_keep(keep, keep_tokens)
    visuals = visuals_from(images, videos, frames, fps)
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
        draw_answer(visuals, prompt, answer).save(show)
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
        if answer.keep.threshold is not None:
            note(_own_keep(manifest, answer))
    ms, count = answer.timings_ms, len(answer.token_ids)
    note(_first_token(ms))
    if count > 1:
        note(f"{count} tokens in {ms_text(ms['total'])} ({ms_text(ms['decode_per_token'])} a decoded token)")
    else:
        note(f"1 token in {ms_text(ms['total'])}")
    if show:
        note(f"kept patches drawn in {show}")


def _first_token(ms: Mapping[str, float]) -> str:
    """`first token after 291 ms: 12.0 ms preparation, 110 ms vision encoder, 169 ms prefill`."""
    prefill = ms["embed"] + ms["prefill"] + ms["prune"]
    parts = {"preparation": ms["prepare"], "vision encoder": ms["vision"], "prefill": prefill}
    told = ", ".join(f"{ms_text(value)} {name}" for name, value in parts.items() if value)
    pruning = f" (of it {ms_text(ms['prune'])} choosing tokens)" if ms["prune"] else ""
    return f"first token after {ms_text(ms['first_token'])}: {told}{pruning}"


def _pruned(manifest: Manifest, answer: Generation) -> str:
    """`kept 15 of 154 visual tokens: 10 % after layer 2 = 25 % on average over 12 layers: ...`."""
    from ep_export.cli.plan import keep_sentence
    from ep_export.planning import make_plan

    text = answer.prompt_tokens - answer.visual_tokens
    plan = make_plan(
        manifest.dims,
        manifest.scheduled(answer.policies),
        answer.keep,
        visual_tokens=answer.visual_tokens,
        text_tokens=text,
        kept=tuple(len(cut.kept_index) - text for cut in answer.cuts),
    )
    saved = {
        "fewer FLOPs to the first token": answer.first_token_flops,
        "fewer in decoder prefill alone": plan.prefill_flops,
        "less visual KV cache": plan.visual_kv_bytes,
    }
    told = (f"{percent_text(1 - pair.pruned / pair.full)} {what}" for what, pair in saved.items())
    return f"kept {keep_sentence(plan)}; {', '.join(told)}"


def _own_keep(manifest: Manifest, answer: Generation) -> str:
    """Why a prompt keeps as many tokens as it does, where every prompt has its own keep."""
    from ep_export.adaptive import bounds

    threshold, visual = answer.keep.threshold, answer.visual_tokens
    if threshold is None:
        return ""
    kept = len(answer.cuts[0].kept_index) - (answer.prompt_tokens - visual)
    schedule, layers = manifest.scheduled(answer.policies), manifest.dims.layers
    fewest, most = bounds(answer.keep, schedule, layers=layers, visual_tokens=visual)
    if kept in {fewest, most}:
        why = f"{kept}, the {'fewest' if kept == fewest else 'most'} that are allowed of {visual}"
    else:
        why = f"the {kept} that score {threshold.value:.4g} or better by {threshold.policy}"
    average = percent_text(answer.keep.ratio or 0)
    averages = f"averages {average} over {threshold.pictures} calibration pictures"
    return f"keep {answer.keep}: {why}; that {averages}"

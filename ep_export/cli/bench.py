"""`ep-export bench`: how fast a bundle is, and how near its policies come to its own unpruned answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ep_export.cli.console import note, print_json, print_table, progress_bar
from ep_export.cli.options import (
    bundle_argument,
    image_option,
    json_option,
    keep_options,
    optional_keep,
    video_options,
    visuals_from,
)
from ep_export.cli.runtime import backend_sentence, open_backend, runtime_options
from ep_export.cli.units import bytes_text
from ep_export.documents import encode
from ep_export.errors import UsageError
from ep_export.planning import check_schedule

if TYPE_CHECKING:
    from ep_export.benchmark import Agreement, Latency, PrunedSide, Question, Side, Spread, Stages

__all__ = ["bench"]

_PROMPT = "What is in the picture?"


@click.command()
@bundle_argument
@image_option
@video_options
@click.option(
    "--images",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of pictures: also compare answers with those of the unpruned bundle.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --images: JSON, picture name -> questions [--prompt about each].",
)
@click.option("--prompt", help=f"The question [{_PROMPT}].")
@keep_options(required=False)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="A policy of the bundle, used at all its cuts; may repeat. Here several are alternatives, compared "
    "in one run; in `ep-export run` they are one a cut [the bundle's own].",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(2),
    default=16,
    show_default=True,
    help="Generated in every round, end tokens ignored; longest answer to compare.",
)
@click.option(
    "--rounds", type=click.IntRange(3), default=9, show_default=True, help="Measured rounds, all sides each."
)
@runtime_options
@json_option
def bench(
    bundle: Path,
    images: Sequence[Path],
    videos: Sequence[Path],
    frames: int | None,
    fps: float | None,
    folder: Path | None,
    prompts: Path | None,
    prompt: str | None,
    keep: float | None,
    keep_tokens: int | None,
    policies: Sequence[str],
    max_new_tokens: int,
    rounds: int,
    as_json: bool,
    **backend_options: Any,
) -> None:
    """Measure a bundle here: unpruned against one or several policies, in one run.

    Times are about the given pictures and videos together, or the first of the folder, or a test card.
    """
    from ep_export.benchmark import measure_agreement, measure_latency
    from ep_export.bundle import Bundle
    from ep_export.runtime import Session
    from ep_export.testcards import make_cards

    wanted = optional_keep(keep, keep_tokens)
    questions = _questions(folder, prompts, prompt, alone=bool(images or videos))
    visuals = visuals_from([questions[0].picture] if questions else images, videos, frames, fps)
    names = tuple(dict.fromkeys(policies))
    sides: Sequence[tuple[str, ...]] = [(name,) for name in names] or [()]
    opened = Bundle.open(bundle, verify=backend_options["verify"])
    for side in sides:  # refused before components are opened
        check_schedule(opened.manifest.scheduled(side), opened.manifest.dims.layers)
    backend = open_backend(opened, **backend_options)
    with Session.open(opened, runner=backend) as session, progress_bar() as progress:
        latency = measure_latency(
            session,
            visuals or make_cards()[:1],
            questions[0].text if questions else prompt or _PROMPT,
            keep=wanted,
            policies=sides,
            new_tokens=max_new_tokens,
            rounds=rounds,
            progress=progress,
        )
        agreement: tuple[Agreement, ...] = ()
        if questions:
            agreement = measure_agreement(
                session,
                questions,
                keep=wanted,
                policies=sides,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
    if sentence := backend_sentence(backend):
        note(sentence)
    if as_json:
        print_json(_as_json(latency, agreement))
        return
    _print(bundle, latency, agreement)


def _questions(
    folder: Path | None, prompts: Path | None, prompt: str | None, *, alone: bool
) -> list[Question]:
    """Every question about every picture of the folder; `alone` where pictures are given one by one.

    Raises:
        UsageError: Options that exclude or need each other.
        UserError: The folder holds no picture, or the file asks nothing of one.
    """
    from ep_export.benchmark import Question
    from ep_export.measure.pictures import find_pictures
    from ep_export.measure.prompts import questions_for, read_questions

    if folder is None:
        if prompts is not None:
            raise UsageError("--prompts asks about the pictures of --images", hint="add --images DIR")
        return []
    if alone:
        raise UsageError("--image or --video and --images exclude each other", hint="give one of them")
    if prompts is not None and prompt is not None:
        raise UsageError("--prompt and --prompts exclude each other", hint="give one of them")
    texts = read_questions(prompts) if prompts else [prompt or _PROMPT]
    return [
        Question(picture.path, text)
        for turn, picture in enumerate(find_pictures(folder))
        for text in questions_for(texts, picture.name, turn)
    ]


def _as_json(latency: Latency, agreement: Sequence[Agreement]) -> dict[str, Any]:
    """Times as they are; with every policy its agreement, null where no answers were compared."""
    told: dict[str, Any] = encode(latency)
    for number, side in enumerate(told["pruned"]):
        side["agreement"] = encode(agreement[number]) if agreement else None
    return told


def _print(bundle: Path, latency: Latency, agreement: Sequence[Agreement]) -> None:
    header = ("median (quartiles)", "unpruned", *(side.policy for side in latency.pruned))
    print_table(str(bundle), header, _rows(latency))
    if agreement:
        print_table(
            "against the bundle's own unpruned answers",
            ("policy", "exact answers", "top-1", "KL"),
            [
                (side.policy, f"{shares.exact:.1%}", f"{shares.top1:.1%}", f"{shares.kl:.4f}")
                for side, shares in zip(latency.pruned, agreement, strict=True)
            ],
        )
        first = agreement[0]
        note(
            f"{first.questions} questions, {first.tokens} tokens of unpruned greedy answers. exact: answers "
            "equal token for token; top-1: tokens the pruned bundle prefers too, given those before; KL: of "
            "the next token, unpruned to pruned, nats a token"
        )
    note(
        f"{latency.prompt_tokens} prompt tokens, {latency.visual_tokens} visual; {latency.rounds} rounds of "
        f"{latency.new_tokens} tokens, all sides in turn, after one to warm up; x: unpruned / pruned, round "
        "by round"
    )
    if latency.peak_memory_bytes:
        note(f"largest resident memory of this process: {bytes_text(latency.peak_memory_bytes)}")


def _rows(latency: Latency) -> list[tuple[str, ...]]:
    """A line a measurement, a column a side; speed-ups below what they are of."""
    full, pruned = latency.full, latency.pruned
    sides: Sequence[Side | PrunedSide] = (full, *pruned)

    def times(name: str, stage: Callable[[Stages], Spread]) -> tuple[str, ...]:
        return (name, *(_text(stage(side.latency_ms)) for side in sides))

    def gains(stage: Callable[[Stages], Spread]) -> tuple[str, ...]:
        return ("", "", *(f"x {_text(stage(side.speedup))}" for side in pruned))

    return [
        (
            "visual tokens after every cut",
            str(latency.visual_tokens),
            *(", ".join(map(str, side.visual_tokens_kept)) for side in pruned),
        ),
        times("time to first token, ms", lambda stages: stages.first_token),
        gains(lambda stages: stages.first_token),
        ("  by FLOPs", "", *(f"x {side.predicted_first_token:.2f}" for side in pruned)),
        times("of it vision encoder, ms", lambda stages: stages.vision),
        times("of it prefill, ms", lambda stages: stages.prefill),
        gains(lambda stages: stages.prefill),
        ("  by decoder FLOPs", "", *(f"x {side.predicted_prefill:.2f}" for side in pruned)),
        ("  of it prune components, ms", "", *(_text(side.prune_ms) for side in pruned)),
        times("decode, ms a token", lambda stages: stages.decode),
        gains(lambda stages: stages.decode),
        ("KV cache after prefill, all layers and tokens", *(bytes_text(side.kv_bytes) for side in sides)),
        ("", "", *(f"x {full.kv_bytes / side.kv_bytes:.2f}" for side in pruned)),
    ]


def _text(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}..{spread.high:.2f})"

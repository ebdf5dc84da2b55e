"""`ep-export bench`: prefill, first token, decode and caches of a bundle, full against pruned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ep_export.cli.console import note, print_json, print_table, progress_bar
from ep_export.cli.options import bundle_argument, image_option, json_option, keep_options, optional_keep

if TYPE_CHECKING:
    from ep_export.benchmark import Benchmark, Spread

__all__ = ["bench"]


@click.command()
@bundle_argument
@image_option
@click.option("--prompt", default="What is in the picture?", show_default=True, help="The question.")
@keep_options(required=False)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(2),
    default=16,
    show_default=True,
    help="Generated in every round, end tokens ignored.",
)
@click.option(
    "--rounds", type=click.IntRange(3), default=9, show_default=True, help="Measured rounds, both sides each."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads [all].")
@json_option
def bench(
    bundle: Path,
    images: Sequence[Path],
    prompt: str,
    keep: float | None,
    keep_tokens: int | None,
    max_new_tokens: int,
    rounds: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure a bundle here, full against pruned, in one run. Without --image, about a test card."""
    from ep_export.benchmark import measure
    from ep_export.bundle import Bundle
    from ep_export.runtime import Session, open_picture
    from ep_export.testcards import make_cards

    wanted = optional_keep(keep, keep_tokens)
    pictures = [open_picture(path) for path in images] or make_cards()[:1]
    opened = Bundle.open(bundle)
    with Session.open(opened, threads=threads) as session, progress_bar() as progress:
        found = measure(
            session,
            pictures,
            prompt,
            keep=wanted or opened.manifest.keep,
            new_tokens=max_new_tokens,
            rounds=rounds,
            progress=progress,
        )
    if as_json:
        print_json(found)
        return
    print_table(str(bundle), ("median (quartiles)", "full", "pruned", "full / pruned"), _rows(found))
    note(
        f"{found.prompt_tokens} prompt tokens, {found.visual_tokens} visual; {found.rounds} rounds of "
        f"{found.new_tokens} tokens, both sides in turn, after one to warm up"
    )
    note(f"decoder FLOPs of prefill, full / pruned: {found.predicted_prefill:.2f}")
    if found.peak_memory_bytes:
        note(f"largest resident memory of this process: {found.peak_memory_bytes / 2**20:.0f} MiB")


def _rows(found: Benchmark) -> list[tuple[str, str, str, str]]:
    full, pruned, gain = found.full.latency_ms, found.pruned.latency_ms, found.speedup
    kept = found.full.visual_tokens_kept, found.pruned.visual_tokens_kept
    kv = found.full.kv_bytes, found.pruned.kv_bytes
    return [
        ("visual tokens from layer K on", str(kept[0]), str(kept[1]), f"{kept[0] / max(1, kept[1]):.2f}"),
        _row("vision encoder, ms", full.vision, pruned.vision, gain.vision),
        _row("prefill, ms", full.prefill, pruned.prefill, gain.prefill),
        _row("first token, ms", full.first_token, pruned.first_token, gain.first_token),
        _row("decode, ms a token", full.decode, pruned.decode, gain.decode),
        (
            "KV cache after prefill, MiB",
            f"{kv[0] / 2**20:.2f}",
            f"{kv[1] / 2**20:.2f}",
            f"{kv[0] / kv[1]:.2f}",
        ),
    ]


def _row(name: str, full: Spread, pruned: Spread, gain: Spread) -> tuple[str, str, str, str]:
    return name, _text(full), _text(pruned), _text(gain)


def _text(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}..{spread.high:.2f})"

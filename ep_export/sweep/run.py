"""A sweep: one model, one set of questions, many ways of pruning; a directory with the record out.

The order: what a calibration recommends, then all questions (`asking`), then prefill times and the gallery.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.calibrate.run import Workplace, tool_versions
from ep_export.methods import METHODS, Method
from ep_export.plan import check_keep
from ep_export.policy import Keep
from ep_export.progress import Progress, silent
from ep_export.staging import refuse_existing, staged
from ep_export.sweep.asking import Announce, Answers, ask_all
from ep_export.sweep.assemble import entropies, in_hindsight, method_infos, rows, unpruned
from ep_export.sweep.calibrated import recommended_methods, recommended_policies
from ep_export.sweep.dataset import Asking, Item, find_items
from ep_export.sweep.gallery import gallery
from ep_export.sweep.measure import Bench, make_bench
from ep_export.sweep.options import SweepOptions
from ep_export.sweep.record import SWEEP_FILE, Asked, Dataset, Recommended, Skipped, SweepRecord, write_sweep
from ep_export.sweep.statistics import Sampling
from ep_export.sweep.timing import time_prefill
from ep_export.sweep.ways import Way, spots, ways_at

if TYPE_CHECKING:
    from ep_export.checkpoint import Checkpoint

__all__ = ["sweep"]

_TIMED_ROUNDS = 3
"""Measurements a prompt and way; the median of three leaves out one disturbance."""


def sweep(
    checkpoint: Checkpoint,
    images: Path,
    asking: Asking | None,
    *,
    out: Path,
    options: SweepOptions,
    overwrite: bool = False,
    progress: Progress = silent,
    announce: Announce = lambda _: None,
) -> SweepRecord:
    """Compare ways of pruning one model on a folder of pictures.

    Args:
        checkpoint: The model.
        images: Folder of pictures.
        asking: Questions, with or without answers; see `read_asking`.
        out: Directory to write: `sweep.json` and the gallery's pictures.
        options: What is compared.
        overwrite: Replace an earlier sweep.
        progress: Called as ("asking", done, total) and for the other stages.
        announce: Told the plan before the work, and how long it will take.

    Returns:
        The record that was written.

    Raises:
        UserError: Nothing can be asked, an impossible keep or layer, or an output that cannot be written.
    """
    refuse_existing(out, overwrite=overwrite, marker=SWEEP_FILE)
    started = time.monotonic()
    for keep in options.keeps:
        check_keep(Keep(ratio=keep))
    spots(options.keeps, checkpoint.dims.layers, options.layers, options.methods, {})  # refuse early
    items, skipped = find_items(images, asking, most=options.max_questions, seed=options.seed)
    with Workplace(out, None) as work:
        recommended = _recommended(checkpoint, options, items, work, progress)
        bench, notes = _bench(checkpoint, options, recommended)
        announce(_plan(bench, items, skipped))
        asked = ask_all(bench, options, items, recommended, work, progress, announce)
        with staged(out, overwrite=overwrite, marker=SWEEP_FILE) as aside:
            record = _record(
                bench, options, images, asked, skipped, recommended, notes, aside, started, progress
            )
            write_sweep(aside, record)
    return record


def _recommended(
    checkpoint: Checkpoint, options: SweepOptions, items: Sequence[Item], work: Path, progress: Progress
) -> tuple[Recommended, ...]:
    if options.calibration is None:
        return ()
    return recommended_policies(
        checkpoint,
        options.calibration,
        options.keeps,
        asked=frozenset(item.digest for item in items),
        seed=options.seed,
        device=options.device,
        work=work,
        progress=progress,
    )


def _bench(
    checkpoint: Checkpoint, options: SweepOptions, recommended: Sequence[Recommended]
) -> tuple[Bench, tuple[str, ...]]:
    policies = recommended_methods(recommended)
    more = {keep: layer for keep, (layer, _) in policies.items()}
    places, notes = spots(options.keeps, checkpoint.dims.layers, options.layers, options.methods, more)
    bench = make_bench(
        checkpoint,
        spots=places,
        ways={spot: ways_at(spot, options.methods, policies) for spot in places},
        seeds=options.seeds,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
    )
    return bench, notes


def _plan(bench: Bench, items: Sequence[Item], skipped: Sequence[Skipped]) -> str:
    ways = bench.all_ways
    methods = len({way.method.key for way in ways})
    runs = len(items) * sum(bench.seeds if way.method.chance else 1 for way in ways)
    left_out = f" ({len(skipped)} left out)" if skipped else ""
    return (
        f"{len(items)} questions{left_out} x {len(ways)} ways of pruning = {runs:,} pruned answers; "
        f"ways: {methods} methods, {len(bench.spots)} pairs of layer and keep"
    )


def _record(
    bench: Bench,
    options: SweepOptions,
    images: Path,
    asked: Answers,
    skipped: Sequence[Skipped],
    recommended: Sequence[Recommended],
    notes: Sequence[str],
    aside: Path,
    started: float,
    progress: Progress,
) -> SweepRecord:
    checkpoint, ways = bench.checkpoint, bench.all_ways
    timed = _spread(asked.items, options.timed_prompts)
    timings = time_prefill(bench, timed, rounds=_TIMED_ROUNDS, progress=progress) if timed else None
    sampling = Sampling(_picture_numbers(asked.items), seed=options.seed)
    methods = {way.method.key: way.method for way in ways}
    found_by = {
        way.key: str(one.policy)
        for one in recommended
        for way in ways
        if way.method.key not in {m.key for m in METHODS} and way.spot.keep == one.keep
    }
    return SweepRecord(
        model=checkpoint.source,
        fingerprint=checkpoint.fingerprint,
        family=checkpoint.family.name,
        layers=checkpoint.dims.layers,
        dims=checkpoint.dims,
        tools=tool_versions(),
        date=dt.datetime.now(dt.timezone.utc).date().isoformat(),
        machine=_machine(options.device),
        seed=options.seed,
        dataset=Dataset(
            name=images.name or str(images),
            questions=len(asked.items),
            pictures=len({item.digest for item in asked.items}),
            answers=bool(asked.items[0].answers),
            skipped=(*skipped, *asked.skipped),
            sha256=hashlib.sha256("\n".join(item.key for item in asked.items).encode()).hexdigest(),
        ),
        keeps=tuple(sorted(options.keeps, reverse=True)),
        swept_layers=tuple(sorted({spot.layer for spot in bench.spots})),
        methods=method_infos([methods[key] for key in _order(methods)]),
        unpruned=unpruned(
            asked.results,
            dims=checkpoint.dims,
            sampling=sampling,
            prefill_ms=timings.full_ms if timings else None,
        ),
        entropies=entropies(asked.results, seed=options.seed),
        recommended=tuple(in_hindsight(one, ways, asked.results, sampling) for one in recommended),
        rows=rows(
            ways,
            asked.results,
            dims=checkpoint.dims,
            sampling=sampling,
            prefill=timings.ways if timings else {},
            found_by=found_by,
        ),
        questions=tuple(
            Asked(
                item.picture.name,
                item.question,
                item.answers[0] if item.answers else None,
                result.full_answer,
            )
            for item, result in zip(asked.items, asked.results, strict=True)
        ),
        gallery=gallery(
            bench,
            _spread(asked.items, options.gallery_pictures),
            _shown(bench, recommended),
            aside,
            progress=progress,
        ),
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def _order(methods: dict[str, Method]) -> list[str]:
    """The recommended policy first, then as in `METHODS`."""
    known = [method.key for method in METHODS if method.key in methods]
    return [*(key for key in methods if key not in known), *known]


def _shown(bench: Bench, recommended: Sequence[Recommended]) -> list[Way]:
    """Ways of the gallery: every method once a keep, at the recommended layer, else at the first there is."""
    found: list[Way] = []
    policies = {one.keep: one.policy.layer for one in recommended if one.policy is not None}
    for keep in dict.fromkeys(spot.keep for spot in bench.spots):
        places = [spot for spot in bench.spots if spot.keep == keep and spot.layer > 0]
        at = next((spot for spot in places if spot.layer == policies.get(keep)), places[0])
        before = [
            way for spot in bench.spots if spot.keep == keep and not spot.layer for way in bench.ways[spot]
        ]
        found += [*bench.ways[at], *(way for way in before if not way.method.chance)]
    return found


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many, at equal distances."""
    if most <= 0:
        return []
    picks = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in dict.fromkeys(picks.tolist())]


def _picture_numbers(items: Sequence[Item]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    known: dict[str, int] = {}
    return np.array([known.setdefault(item.digest, len(known)) for item in items], dtype=np.int64)


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

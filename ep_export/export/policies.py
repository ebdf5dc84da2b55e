"""Choosers as components of a bundle: one small file a cut and policy, beside which nothing changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ep_export.bundle import (
    Bundle,
    Component,
    Dialect,
    FileEntry,
    Manifest,
    Precision,
    Role,
    list_files,
    write_manifest,
)
from ep_export.dims import DecoderDims
from ep_export.errors import UsageError, UserError
from ep_export.export.components import PRECISION_DTYPES, save_component
from ep_export.interrupts import uninterrupted
from ep_export.policy import (
    Chooser,
    Coverage,
    Schedule,
    Scorer,
    Source,
    TopK,
    reads_projections,
    scored_source,
)
from ep_export.staging import scratch

__all__ = ["OPSETS", "add_policies", "check_choosers", "chooser_notes", "save_policies"]

OPSETS = {Dialect.PORTABLE: 20, Dialect.MODERN: 24, Dialect.ONNXRUNTIME: 23}


def save_policies(
    directory: Path,
    schedule: Schedule,
    choosers: Mapping[int, Sequence[Chooser]],
    *,
    dims: DecoderDims,
    dialect: Dialect,
    precision: Precision,
    degree: int,
) -> tuple[Component, ...]:
    """Write `prune_<cut>.<policy>.onnx` for cuts and their choosers (see `check_choosers`).

    Args:
        directory: Where to.
        schedule: The cuts.
        choosers: Number of a cut -> what to write for it.
        dims: The decoder's dimensions.
        dialect: Operators of the bundle.
        precision: Arithmetic type of the bundle.
        degree: Of the entropy series.
    """
    from ep_export.choosers.component import build_prune

    return tuple(
        save_component(
            build_prune(
                chooser,
                dims=dims,
                cut_layer=schedule.cuts[cut].layer,
                precision_dtype=PRECISION_DTYPES[precision],
                degree=degree,
                opset=OPSETS[dialect],
            ),
            directory,
            f"prune_{cut}.{chooser.name}",
            Role.PRUNE,
            cut=cut,
            chooser=chooser,
        )
        for cut, here in choosers.items()
        for chooser in here
    )


def add_policies(bundle: Bundle, choosers: Sequence[Chooser], *, cuts: Sequence[int] | None = None) -> Bundle:
    """Write further choosers into a bundle; no other component changes, and no checkpoint is needed.

    Args:
        bundle: The bundle.
        choosers: What to add.
        cuts: Numbers of the cuts that get them; None: all.

    Returns:
        The bundle with its new manifest. On an error nothing of it has changed.

    Raises:
        UserError: A cut has one of that name, or scores attention that the span before it does not give out,
            or see `check_choosers`.
        UsageError: The bundle has no such cut.
    """
    manifest = bundle.manifest
    numbers = tuple(dict.fromkeys(manifest.cuts if cuts is None else cuts))
    choosers = tuple(dict.fromkeys(choosers))
    _refuse_present(manifest, choosers, numbers)
    added = dict.fromkeys(numbers, choosers)
    check_choosers(manifest.schedule, added, manifest.dims)
    _refuse_without_states(manifest, choosers, numbers)
    with scratch(bundle.path, "policies") as aside:
        components = save_policies(
            aside,
            manifest.schedule,
            added,
            dims=manifest.dims,
            dialect=manifest.dialect,
            precision=manifest.precision,
            degree=manifest.degree,
        )
        new = replace(
            manifest,
            components=manifest.components + components,
            files=_listed(manifest.files, aside),
            warnings=tuple(dict.fromkeys(manifest.warnings + chooser_notes(choosers, manifest.dims))),
        )
        _move_in(bundle, new, [aside / component.file for component in components])
    return Bundle(bundle.path, new)


def check_choosers(schedule: Schedule, choosers: Mapping[int, Sequence[Chooser]], dims: DecoderDims) -> None:
    """Refuse choosers that the graphs cannot express where they stand.

    Args:
        schedule: The cuts.
        choosers: Number of a cut -> what stands there.
        dims: The decoder's dimensions.

    Raises:
        UserError: Projections read at layer 0, or hidden states that do not divide into heads.
    """
    for cut, chooser in ((cut, chooser) for cut, here in choosers.items() for chooser in here):
        if scored_source(chooser) is Source.HIDDEN and dims.hidden_size % dims.heads:
            raise UserError(
                f"policy {chooser.name} needs hidden states that divide into heads, the model has "
                f"{dims.hidden_size} for {dims.heads}",
                hint="give a policy that scores queries, keys or values",
            )
        if reads_projections(chooser) and schedule.cuts[cut].layer == 0:
            raise UserError(
                f"policy {chooser.name} scores projections, and there are none before layer 0",
                hint="give a policy that reads none: divprune, random, nothing, or one on hidden states",
            )


def chooser_notes(choosers: Iterable[Chooser], dims: DecoderDims) -> tuple[str, ...]:
    """What a user of these choosers should know."""
    notes = []
    for chooser in choosers:
        if not isinstance(chooser, TopK | Coverage) or chooser.scorer not in (Scorer.PAPER, Scorer.ORDER2):
            continue
        heads = dims.kv_heads if chooser.source in (Source.KEY, Source.VALUE) else dims.heads
        if heads <= 2:
            # Two centred rows are opposite: normalised, they are the same rank-one matrix for every token.
            states = chooser.source.value
            notes.append(f"every token scores the same: {states} states have only {heads} heads")
    return tuple(dict.fromkeys(notes))


def _refuse_present(manifest: Manifest, choosers: Sequence[Chooser], cuts: Sequence[int]) -> None:
    for cut in cuts:
        if cut not in manifest.cuts:
            raise UsageError(
                f"bundle has no cut {cut}, it has {len(manifest.cuts)}",
                hint=f"give a number from 0 to {len(manifest.cuts) - 1}",
            )
        here = {p.chooser.name for p in manifest.with_role(Role.PRUNE) if p.cut == cut and p.chooser}
        for chooser in choosers:
            if chooser.name in here:
                raise UserError(
                    f"bundle has policy {chooser.name} at cut {cut} already",
                    hint="run it as it is, or name another policy",
                )


def _refuse_without_states(manifest: Manifest, choosers: Sequence[Chooser], cuts: Sequence[int]) -> None:
    """Spans give attention out only where a policy scored it when the bundle was built."""
    output = f"{Source.ATTENTION.value}_states"
    scoring = [chooser.name for chooser in choosers if scored_source(chooser) is Source.ATTENTION]
    ends = {manifest.schedule.cuts[cut].layer for cut in cuts}
    for span in manifest.spans if scoring else ():
        if span.layer_range.stop in ends and output not in {spec.name for spec in span.outputs}:
            raise UserError(
                f"policy {scoring[0]} scores attention, which {span.name} of this bundle does not give out",
                hint=f"build it again with --policy {scoring[0]}; other policies can be added to that",
            )


def _listed(files: tuple[FileEntry, ...], aside: Path) -> tuple[FileEntry, ...]:
    """The bundle's files and those that lie aside; a file that a killed run left is replaced."""
    by_path = {entry.path: entry for entry in (*files, *list_files(aside))}
    return tuple(by_path[path] for path in sorted(by_path))


def _move_in(bundle: Bundle, manifest: Manifest, files: Sequence[Path]) -> None:
    """Files first, the manifest that names them last."""
    with uninterrupted():
        try:
            for file in files:
                file.replace(bundle.path / file.name)
            write_manifest(bundle.path, manifest)
        except BaseException:
            for file in files:
                (bundle.path / file.name).unlink(missing_ok=True)
            raise

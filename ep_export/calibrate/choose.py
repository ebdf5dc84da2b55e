"""From what is known and what was asked for to one schedule and the evidence it stands on.

Enters: the model, what the command line asked for, and a fresh record if one was just measured. Leaves: a
schedule and one sentence that says exactly what it stands on. Nothing is assumed silently: with neither a
record nor a layer this stops and says what to give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ep_export.adaptive import adaptive_schedule
from ep_export.aliases import find_alias
from ep_export.calibrate.horizon import before_horizon
from ep_export.calibrate.record import Candidate, Record, read_calibration
from ep_export.data import data_dir
from ep_export.errors import UsageError, UserError
from ep_export.measure.provenance import processor_fingerprint
from ep_export.planning import TEXT_TOKENS, Plan, check_schedule, make_plan, settled_keep
from ep_export.policy import Budget, Chooser, Cut, Evidence, EvidenceKind, Keep, Schedule, TopK, chooser_named

if TYPE_CHECKING:
    from pathlib import Path

    from ep_export.checkpoint import ModelConfig
    from ep_export.dims import DecoderDims
    from ep_export.vision_flops import VisionWork

__all__ = [
    "ScheduleRequest",
    "Settled",
    "check_belongs",
    "find_published",
    "needs_calibration",
    "resolve_keep",
    "resolve_schedule",
    "settle",
]


@dataclass(frozen=True)
class ScheduleRequest:
    """What the command line said about where and how to prune; None where it said nothing.

    Attributes:
        cuts: All of it; the other fields are then empty.
        system: Key of a published method of several stages; layer and chooser are then empty.
        layer: K of a single cut.
        chooser: Of a single cut.
        budget: Of a recommended `TopK`, when `chooser` is None.
        calibration: A calibration record on disk.
    """

    cuts: tuple[Cut, ...] | None = None
    system: str | None = None
    layer: int | None = None
    chooser: Chooser | None = None
    budget: Budget = Budget.JOINT
    calibration: Path | None = None

    @property
    def overrides(self) -> bool:
        """Whether it names layer or chooser of a single cut itself."""
        return self.layer is not None or self.chooser is not None


@dataclass(frozen=True)
class Settled:
    """How a model will be pruned.

    Attributes:
        dims: The decoder's dimensions.
        schedule: Where and how.
        evidence: What that stands on.
        keep: How much, as it was told; None where only the shares of the cuts, or a budget, say it.
    """

    dims: DecoderDims
    schedule: Schedule
    evidence: Evidence
    keep: Keep | None

    @property
    def average_keep(self) -> Keep:
        """As told, else what the shares come to; see `ep_export.planning.settled_keep`."""
        return settled_keep(self.keep, self.schedule, layers=self.dims.layers)

    def plan(
        self, work: VisionWork, *, text_tokens: int = TEXT_TOKENS, kv_bytes_per_element: int = 2
    ) -> Plan:
        """What it comes to for one prompt with such pictures; see `ep_export.planning.make_plan`."""
        return make_plan(
            self.dims,
            self.schedule,
            self.average_keep,
            visual_tokens=work.visual_tokens,
            text_tokens=text_tokens,
            kv_bytes_per_element=kv_bytes_per_element,
            vision=work,
        )


def settle(
    config: ModelConfig, request: ScheduleRequest, *, keep: Keep | None, fresh: Record | None = None
) -> Settled:
    """Decide how a model will be pruned.

    Args:
        config: The opened checkpoint or config.
        request: What was asked for.
        keep: How much is kept; None where the cuts say it.
        fresh: A record measured just now.

    Raises:
        UserError: See `resolve_keep` and `resolve_schedule`.
    """
    keep = resolve_keep(config, request, keep=keep, fresh=fresh)
    schedule, evidence = resolve_schedule(config, request, fresh=fresh, keep=keep)
    return Settled(config.dims, schedule, evidence, keep)


def find_published(model: str) -> Record | None:
    """The shipped record of an alias or hub id, if there is one."""
    alias = find_alias(model)
    if alias is None:
        return None
    file = data_dir("calibration") / "records" / f"{alias.name}.json"
    return read_calibration(file) if file.is_file() else None


def needs_calibration(config: ModelConfig, request: ScheduleRequest) -> bool:
    """Whether only a calibration on pictures can answer: no cut, layer or record is given, none shipped."""
    said = (request.cuts, request.system, request.layer, request.calibration)
    return all(value is None for value in said) and find_published(config.source) is None


def resolve_schedule(
    config: ModelConfig,
    request: ScheduleRequest,
    *,
    fresh: Record | None = None,
    keep: Keep | None = None,
) -> tuple[Schedule, Evidence]:
    """Decide the schedule.

    Cuts that were asked for are taken as they are; where a record measured the information horizon, the
    evidence warns of a second cut before it. Else a record counts in this order: the file given, one
    measured just now, one shipped with ep-export. Without further wishes its recommendation is taken as it
    stands. A layer or chooser named on the command line wins over the record; the evidence then says whether
    the record measured that combination.

    Args:
        config: The opened checkpoint or config.
        request: What was asked for.
        fresh: A record measured just now.
        keep: What will be kept, so that the evidence can say when it was measured at another.

    Returns:
        The schedule, and why. A single cut that was not asked for as such has no share.

    Raises:
        UserError: Nothing says where to prune, or the record belongs to another model.
        UsageError: The schedule is impossible (see `check_schedule`).
    """
    layers = config.dims.layers
    if keep is not None and keep.threshold is not None and request.cuts is None and not request.overrides:
        schedule, (record, name) = adaptive_schedule(keep.threshold), _record(config, request, fresh)
        summary = _told() if record is None else _evidence(record, schedule, name, request, keep)
        return schedule, summary
    if request.system is not None:
        schedule = _system(request.system, layers, keep)
        check_schedule(schedule, layers)
        return schedule, _told(_horizon_warning(config, request, schedule, fresh))
    if request.cuts is not None:
        schedule = Schedule(request.cuts)
        check_schedule(schedule, layers)
        return schedule, _told(_horizon_warning(config, request, schedule, fresh))
    if request.layer is not None:
        _check_cut(Cut(request.layer, request.chooser or TopK()), layers)
    record, name = _record(config, request, fresh)
    if record is None:
        cut = _told_cut(request)
        _check_cut(cut, layers)
        return Schedule((cut,)), _told()
    check_belongs(record, config, name)
    schedule = _schedule(record, request, name)
    check_schedule(schedule, layers)
    return schedule, _evidence(record, schedule, name, request, keep)


def resolve_keep(
    config: ModelConfig, request: ScheduleRequest, *, keep: Keep | None, fresh: Record | None = None
) -> Keep | None:
    """The keep that was asked for; an adaptive one with the threshold of the record that counts.

    Args:
        config: The opened checkpoint or config.
        request: What was asked for.
        keep: How much is kept.
        fresh: A record measured just now.

    Raises:
        UserError: It is adaptive, and there is no record, one of another model or processor, or one that has
            no threshold for that average.
    """
    if keep is None or not keep.adaptive or keep.threshold is not None:
        return keep
    record, name = _record(config, request, fresh)
    if record is None:
        raise UserError(
            f"keep {keep} needs a calibration record, and there is none of {config.source}",
            hint=f"give --calibration FILE from `ep-export calibrate --keep {keep.ratio:g}`, or --images DIR",
        )
    check_belongs(record, config, name)
    if record.adaptive is None or record.adaptive.ratio != keep.ratio:
        has = "none" if record.adaptive is None else f"one for {record.adaptive}"
        raise UserError(
            f"calibration record {name or config.source} has no threshold for keep {keep}, it has {has}",
            hint=f"calibrate with --keep {keep.ratio:g}, or give a fixed --keep {keep.ratio:g}",
        )
    return record.adaptive


def check_belongs(record: Record, config: ModelConfig, name: str | None = None) -> None:
    """Refuse the record of another model.

    By layer count always; by weights and by processor files where both sides know them (a bare config does
    not).

    Args:
        record: The record.
        config: The opened checkpoint or config.
        name: What errors call the record.

    Raises:
        UserError: It belongs to another model.
    """
    what = f"calibration record {name}" if name else "the calibration record"
    hint = "give the record of this model, or calibrate it with `ep-export calibrate`"
    if record.layers != config.dims.layers:
        message = f"{what} is for a model of {record.layers} layers, {config.source} has {config.dims.layers}"
        raise UserError(message, hint=hint)
    fingerprint = getattr(config, "fingerprint", None)
    if record.fingerprint and fingerprint and record.fingerprint != fingerprint:
        raise UserError(
            f"{what} was measured on other weights ({record.model}) than {config.source}", hint=hint
        )
    files = getattr(config, "processor_files", None)
    if record.processor and files is not None and record.processor != processor_fingerprint(files):
        raise UserError(
            f"{what} was measured with other tokenizer or processor files than {config.source} has now",
            hint="calibrate again with `ep-export calibrate`, or restore the files",
        )


def _system(key: str, layers: int, keep: Keep | None) -> Schedule:
    """A published method of several stages as the schedule it is in a model of so many layers."""
    from ep_export.methods import method_named

    method = method_named(key)
    if method.stages is None:
        raise ValueError(f"method {key} has no stages")
    share = keep.ratio if keep is not None and keep.ratio is not None else 1.0
    return Schedule(
        tuple(
            Cut(stage.layer, chooser_named(stage.method), stage.share)
            for stage in method.stages(layers, share)
        )
    )


def _check_cut(cut: Cut, layers: int) -> None:
    check_schedule(Schedule((cut,)), layers)


def _record(
    config: ModelConfig, request: ScheduleRequest, fresh: Record | None
) -> tuple[Record | None, str | None]:
    if request.calibration is not None:
        return read_calibration(request.calibration), request.calibration.name
    if fresh is not None:
        return fresh, None
    record = find_published(config.source)
    return record, None if record is None else f"{record.model}.json"


def _told_cut(request: ScheduleRequest) -> Cut:
    if request.layer is None:
        raise UserError(
            "nothing says where this model can be pruned: no calibration record, no --layer, no --cut",
            hint="measure it: `ep-export calibrate`, then --calibration FILE here (`build` with --images DIR "
            "measures by itself); or give --layer K",
        )
    return Cut(request.layer, request.chooser or TopK(budget=request.budget))


def _told(warning: str | None = None) -> Evidence:
    said = "from the command line; nothing measured it on this model"
    return Evidence(EvidenceKind.TOLD, f"{said}; warning: {warning}" if warning else said)


def _horizon_warning(
    config: ModelConfig, request: ScheduleRequest, schedule: Schedule, fresh: Record | None
) -> str | None:
    """What a record of this model has against cuts that were asked for."""
    record, name = _record(config, request, fresh)
    if record is None:
        return None
    check_belongs(record, config, name)
    return before_horizon(record.horizon, schedule)


def _schedule(record: Record, request: ScheduleRequest, name: str | None) -> Schedule:
    if not request.overrides:
        if record.recommended is None:
            raise _nothing_recommended(record, name)
        return _with_budget(record.recommended, request.budget)
    return Schedule((_overriding_cut(record, request),))


def _with_budget(schedule: Schedule, budget: Budget) -> Schedule:
    """The same cuts, every score kept under that budget."""
    if budget is not Budget.JOINT and not any(isinstance(cut.chooser, TopK) for cut in schedule.cuts):
        raise UsageError(
            f"the recommended schedule ({schedule}) has no budget per picture", hint="leave out --budget"
        )
    return schedule.with_choosers([_budgeted(cut.chooser, budget) for cut in schedule.cuts])


def _budgeted(chooser: Chooser, budget: Budget) -> Chooser:
    return replace(chooser, budget=budget) if isinstance(chooser, TopK) else chooser


def _overriding_cut(record: Record, request: ScheduleRequest) -> Cut:
    """What was asked for, the rest from the recommendation, or from where the entropy collapses."""
    base = record.recommended.cuts[0] if record.recommended is not None else None
    chooser = request.chooser or _budgeted(base.chooser if base else TopK(), request.budget)
    if request.layer is not None:
        return Cut(request.layer, chooser)
    if base is not None and _budgeted(chooser, Budget.JOINT) == _budgeted(base.chooser, Budget.JOINT):
        return Cut(base.layer, chooser)
    if record.ecl is not None:
        return Cut(record.ecl, chooser)
    raise UserError(
        f"no entropy collapse was found in {record.model}, so nothing says where {chooser.name} prunes",
        hint="give --layer K, or --policy auto to take what was measured best",
    )


def _nothing_recommended(record: Record, name: str | None) -> UserError:
    collapse = (
        "no entropy collapse found" if record.ecl is None else f"entropy collapses at layer {record.ecl}"
    )
    why = record.recommendation or "the record recommends no policy"
    message = f"{name or 'calibration'} recommends nothing for {record.model}: {why}; {collapse}"
    hint = "give --layer K and --policy to prune anyway, a larger --keep, or more pictures"
    return UserError(message, hint=hint)


def _evidence(
    record: Record, schedule: Schedule, name: str | None, request: ScheduleRequest, keep: Keep | None
) -> Evidence:
    if record.provenance.kind is EvidenceKind.PUBLISHED:
        joint = schedule.with_choosers([_budgeted(cut.chooser, Budget.JOINT) for cut in schedule.cuts])
        if joint == record.recommended:
            return Evidence(EvidenceKind.PUBLISHED, f"{record.provenance.source}; not measured here", name)
        summary = "from the command line, in place of the published policy; nothing measured it on this model"
        return Evidence(EvidenceKind.TOLD, summary, name)
    measured = record.candidate_for(schedule)
    if measured is not None:
        return Evidence(EvidenceKind.MEASURED, _measured_summary(record, measured, request, keep), name)
    if schedule == record.recommended:
        # a record without a table: its word is all there is
        return Evidence(EvidenceKind.MEASURED, f"recommended by the record of {record.images} pictures", name)
    summary = "from the command line; the calibration did not measure this combination"
    return Evidence(EvidenceKind.TOLD, summary, name)


def _measured_summary(
    record: Record, measured: Candidate, request: ScheduleRequest, keep: Keep | None
) -> str:
    where = f"measured on {measured.images or record.images} pictures at keep {measured.keep:g}"
    parts = [
        f"{where}: KL {measured.kl:.3g} to the full model, top-1 agreement {measured.top1_agreement:.1%}"
    ]
    floor = record.random_floor(measured.layer)
    if floor is not None:
        parts.append(f"random tokens KL {floor.kl:.3g}, {floor.top1_agreement:.1%}")
    if request.overrides:
        parts.append("chosen on the command line")
    elif record.recommended_confidence is not None:
        parts.append(f"best in {record.recommended_confidence:.0%} of resamples")
        if record.images_needed is not None:
            parts.append(f"about {record.images_needed} pictures needed to tell it from the next best")
    if record.ecl is None:
        parts.append("no entropy collapse found")
    if keep is not None and record.keep is not None and keep != record.keep:
        parts.append(f"to be used at keep {keep}")
    return "; ".join(parts)

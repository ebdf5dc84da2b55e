"""From what is known and what was asked to one policy and the evidence it stands on.

Enters: the model, what the command line asked for, and a fresh record if one was just measured. Leaves: a
policy and one sentence that says exactly what it stands on. Nothing is assumed silently: with neither a
record nor a layer this stops and says what to give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_export.aliases import find_alias
from ep_export.calibrate.record import Record, read_record
from ep_export.data import data_dir
from ep_export.errors import UsageError, UserError, near_matches
from ep_export.plan import check_layer
from ep_export.policy import Budget, Evidence, EvidenceKind, Keep, Policy, Scorer, Select, Source

if TYPE_CHECKING:
    from pathlib import Path

    from ep_export.checkpoint import ModelConfig

__all__ = ["AUTO", "PolicyRequest", "find_published", "needs_calibration", "resolve_policy"]

AUTO = "auto"


@dataclass(frozen=True)
class PolicyRequest:
    """What the command line said about the policy; None where it said nothing.

    Attributes:
        name: "auto", or a `Scorer` value.
        layer: K.
        select: Which end of the scores is kept.
        source: The states that are scored.
        budget: Joint, or per picture.
        record: A calibration record on disk.
    """

    name: str = AUTO
    layer: int | None = None
    select: Select | None = None
    source: Source | None = None
    budget: Budget = Budget.JOINT
    record: Path | None = None

    @property
    def overrides(self) -> bool:
        """Whether it names any part of the policy itself."""
        named = (self.layer, self.select, self.source)
        return self.name != AUTO or any(value is not None for value in named)


def find_published(model: str) -> Record | None:
    """The shipped record of an alias or hub id, if there is one."""
    alias = find_alias(model)
    if alias is None:
        return None
    file = data_dir("calibration") / "records" / f"{alias.name}.json"
    return read_record(file) if file.is_file() else None


def needs_calibration(config: ModelConfig, request: PolicyRequest) -> bool:
    """Whether only a calibration on pictures can answer: no record given or shipped, and no layer named."""
    return request.record is None and request.layer is None and find_published(config.source) is None


def resolve_policy(
    config: ModelConfig, request: PolicyRequest, *, fresh: Record | None = None, keep: Keep | None = None
) -> tuple[Policy, Evidence]:
    """Decide the policy.

    A record counts in this order: the file given, one measured just now, one shipped with ep-export. `auto`
    without further wishes takes its recommendation as it stands. Parts named on the command line win over
    the record; the evidence then says whether the record measured that combination.

    Args:
        config: The opened checkpoint or config.
        request: What was asked for.
        fresh: A record measured just now.
        keep: What will be kept, so that the evidence can say when it was measured at another.

    Raises:
        UserError: Nothing says where to prune, or the record belongs to another model.
        UsageError: The layer is out of range or the policy's name is unknown.
    """
    _check_name(request.name)
    if request.layer is not None:
        check_layer(request.layer, config.dims.layers)
    record, name = _record(config, request, fresh)
    if record is None:
        return _told(request)
    _check_belongs(record, config, name)
    policy = _policy(record, request, name)
    check_layer(policy.layer, config.dims.layers)
    return policy, _evidence(record, policy, name, request, keep)


def _check_name(name: str) -> None:
    known = [AUTO, *(scorer.value for scorer in Scorer)]
    if name not in known:
        raise UsageError(f"policy {name!r} is unknown", hint=near_matches(name, known))


def _record(
    config: ModelConfig, request: PolicyRequest, fresh: Record | None
) -> tuple[Record | None, str | None]:
    if request.record is not None:
        return read_record(request.record), request.record.name
    if fresh is not None:
        return fresh, None
    record = find_published(config.source)
    return record, None if record is None else f"{record.model}.json"


def _told(request: PolicyRequest) -> tuple[Policy, Evidence]:
    if request.layer is None:
        raise UserError(
            "nothing says where this model can be pruned: no calibration record, no --layer",
            hint="measure it: `ep-export calibrate`, then --calibration FILE here (`build` with --images DIR "
            "measures by itself); or give --layer K",
        )
    policy = Policy(
        layer=request.layer,
        scorer=Scorer.PAPER if request.name == AUTO else Scorer(request.name),
        select=request.select or Select.HIGHEST,
        source=request.source or Source.QUERY,
        budget=request.budget,
    )
    return policy, Evidence(EvidenceKind.TOLD, "from the command line; nothing measured it on this model")


def _check_belongs(record: Record, config: ModelConfig, name: str | None) -> None:
    """Refuse the record of another model: by layer count always, by fingerprint where both have one."""
    what = f"calibration record {name}" if name else "the calibration record"
    hint = "give the record of this model, or calibrate it with `ep-export calibrate`"
    if record.layers != config.dims.layers:
        message = f"{what} is for a model of {record.layers} layers, {config.source} has {config.dims.layers}"
        raise UserError(message, hint=hint)
    fingerprint = getattr(config, "fingerprint", None)  # a bare config has none
    if record.fingerprint and fingerprint and record.fingerprint != fingerprint:
        raise UserError(
            f"{what} was measured on other weights ({record.model}) than {config.source}", hint=hint
        )


def _policy(record: Record, request: PolicyRequest, name: str | None) -> Policy:
    if not request.overrides:
        if record.recommended is None:
            raise _nothing_recommended(record, name)
        return _with_budget(record.recommended, request.budget)
    base = record.recommended
    scorer = _scorer(base, request)
    same_scorer = base is not None and base.scorer is scorer
    return Policy(
        layer=_layer(record, request, same_scorer=same_scorer),
        scorer=scorer,
        # the record's direction was measured for its own scorer; another one starts as published
        select=request.select or (base.select if base and same_scorer else Select.HIGHEST),
        source=request.source or (base.source if base else Source.QUERY),
        budget=request.budget,
    )


def _with_budget(policy: Policy, budget: Budget) -> Policy:
    return Policy(policy.layer, policy.scorer, policy.select, policy.source, budget)


def _scorer(base: Policy | None, request: PolicyRequest) -> Scorer:
    if request.name != AUTO:
        return Scorer(request.name)
    return base.scorer if base else Scorer.PAPER


def _layer(record: Record, request: PolicyRequest, *, same_scorer: bool) -> int:
    """The layer asked for, else the recommended one of this scorer, else where the entropy collapses."""
    if request.layer is not None:
        return request.layer
    if record.recommended is not None and same_scorer:
        return record.recommended.layer
    if record.ecl is not None:
        return record.ecl
    raise UserError(
        f"no entropy collapse was found in {record.model}, so nothing says where {request.name} prunes",
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
    record: Record, policy: Policy, name: str | None, request: PolicyRequest, keep: Keep | None
) -> Evidence:
    if record.provenance.kind is EvidenceKind.PUBLISHED:
        same = record.recommended is not None and policy == _with_budget(record.recommended, policy.budget)
        if same:
            return Evidence(EvidenceKind.PUBLISHED, f"{record.provenance.source}; not measured here", name)
        summary = "from the command line, in place of the published policy; nothing measured it on this model"
        return Evidence(EvidenceKind.TOLD, summary, name)
    measured = record.candidate_for(policy)
    if measured is None or policy.budget is not Budget.JOINT:
        if request.overrides or policy.budget is not Budget.JOINT:
            summary = "from the command line; the calibration did not measure this combination"
            return Evidence(EvidenceKind.TOLD, summary, name)
        # a record without a table: its word is all there is
        return Evidence(EvidenceKind.MEASURED, f"recommended by the record of {record.images} pictures", name)
    return Evidence(EvidenceKind.MEASURED, _measured_summary(record, policy, request, keep), name)


def _measured_summary(record: Record, policy: Policy, request: PolicyRequest, keep: Keep | None) -> str:
    measured = record.candidate_for(policy)
    if measured is None:  # unreachable: the caller checked
        raise RuntimeError("the policy was not measured")
    where = f"measured on {record.images} pictures at keep {measured.keep:g}"
    parts = [
        f"{where}: KL {measured.kl:.3g} to the full model, top-1 agreement {measured.top1_agreement:.1%}"
    ]
    floor = record.random_floor(policy.layer)
    if floor is not None:
        parts.append(f"random tokens KL {floor.kl:.3g}, {floor.top1_agreement:.1%}")
    if request.overrides:
        parts.append("chosen on the command line")
    elif record.recommended_confidence is not None:
        parts.append(f"best in {record.recommended_confidence:.0%} of resamples")
    if record.ecl is None:
        parts.append("no entropy collapse found")
    if keep is not None and record.keep is not None and keep != record.keep:
        parts.append(f"to be used at keep {keep}")
    return "; ".join(parts)

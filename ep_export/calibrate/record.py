"""The calibration record: what was measured, or published, about where and how to prune one model.

A frozen structure as strict JSON: read with distrust, written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ep_export.calibrate.horizon import Horizon
from ep_export.documents import read_document, write_document
from ep_export.errors import UserError, reason
from ep_export.numerics import Weights
from ep_export.planning import check_schedule
from ep_export.policy import Cut, EvidenceKind, Keep, Random, Schedule, chooser_named

__all__ = [
    "RANDOM",
    "RECORD_FORMAT",
    "Candidate",
    "LayerCurve",
    "Provenance",
    "Record",
    "read_calibration",
    "write_calibration",
]

RECORD_FORMAT = 3
_OLDEST_FORMAT = 2
"""Format 2 knows neither horizon, metrics nor second cuts; all are optional."""

RANDOM = Random().name
"""Policy of the floor: tokens kept at random, several draws averaged."""


@dataclass(frozen=True)
class Candidate:
    """How one schedule compares with the unpruned model on the pictures.

    Attributes:
        layer: K of its first cut.
        policy: Name of that cut's chooser; "random" for the floor.
        keep: Average over layers that was measured, as a ratio.
        kl: Mean KL(full || pruned) in nats over the answer positions, each picture weighing the same.
        kl_low: Lower end of its 95% interval over pictures (bootstrap).
        kl_high: Upper end.
        top1_agreement: Share of answer positions where both models would say the same token.
        images: Pictures it was measured on: fewer than the record's where it fell out of the race.
        share: Of the first cut, in a schedule of two.
        second: The second cut; None for a single one.
    """

    layer: int
    policy: str
    keep: float
    kl: float
    top1_agreement: float
    kl_low: float | None = None
    kl_high: float | None = None
    images: int | None = None
    share: float | None = None
    second: Cut | None = None

    @property
    def schedule(self) -> Schedule:
        """What was measured.

        Raises:
            UsageError: No chooser is called so.
        """
        first = Cut(self.layer, chooser_named(self.policy), self.share)
        return Schedule((first,) if self.second is None else (first, self.second))

    @property
    def name(self) -> str:
        """Choosers and layers, e.g. `divprune at 0, nothing at 9`."""
        cuts = [(self.policy, self.layer)]
        cuts += [] if self.second is None else [(self.second.chooser.name, self.second.layer)]
        return ", ".join(f"{policy} at {layer}" for policy, layer in cuts)


@dataclass(frozen=True)
class LayerCurve:
    """A metric of the visual tokens by layer.

    Attributes:
        metric: Key of an `ep_export.entropy.LayerMetric`.
        values: [L] mean over pictures.
        spread: [L] standard deviation over pictures.
        collapse: Layer at which it collapses; None when it does not.
        finding: One sentence: why there is or is no collapse.
    """

    metric: str
    values: tuple[float, ...]
    spread: tuple[float, ...]
    collapse: int | None
    finding: str


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from.

    Attributes:
        kind: Published or measured.
        source: The publication, or the name of the picture folder.
        date: ISO date it was published, looked up or measured.
        tools: Package name -> version that measured it.
        images_sha256: Hash over the pictures' own hashes, in order.
        questions: What the model was asked.
        seed: Of every random choice.
    """

    kind: EvidenceKind
    source: str
    date: str
    tools: Mapping[str, str] = field(default_factory=dict)
    images_sha256: str | None = None
    questions: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Record:
    """What calibration says about one model.

    Attributes:
        model: Alias, hub id or directory name.
        layers: L.
        query_entropy: [L] mean layer entropy of the visual tokens' queries, in nats; empty when not measured.
        key_entropy: [L] the same of the keys.
        images: Pictures the means are over.
        ecl: The Entropy Collapse Layer K, None when there is no collapse.
        confidence: Share of bootstrap resamples of the pictures with the sharpest drop at the same layer.
        candidates: The fidelity table, empty when not measured.
        recommended: The schedule to use, None when nothing beats random.
        provenance: Where this comes from.
        fingerprint: `Checkpoint.fingerprint` of the measured weights.
        processor: `processor_fingerprint` of the tokenizer and picture processor it was measured with.
        query_spread: [L] standard deviation over pictures.
        key_spread: [L] the same of the keys.
        collapse_finding: One sentence: why there is or is no collapse.
        recommendation: One sentence: why this schedule, or none.
        recommended_confidence: Share of bootstrap resamples in which the recommended cut is the best one.
        keep: What was asked for.
        adaptive: The same average with a number of tokens of every picture's own, and the one cut it is for;
            None where no single cut that was measured has scores that decide it.
        skipped: Files that could not be used, with the reason.
        metrics: Other metrics by layer, each judged for a collapse as the entropy of the queries is.
        detectors: One sentence: where the detectors of a collapse agree.
        horizon: The Information Horizon; None when it was not measured.
        horizons: The same for every kind of question that the prompts name.
        images_needed: Pictures that could tell the recommended schedule apart from its closest rival, or show
            that only noise lies between them; None where either is sure.
        visual_tokens: Of a prompt, mean over pictures.
        weights: What the measured model's linear layers were rounded to; None: its own weights.
        format: Version of this structure.
    """

    model: str
    layers: int
    query_entropy: tuple[float, ...]
    key_entropy: tuple[float, ...]
    images: int
    ecl: int | None
    confidence: float | None
    candidates: tuple[Candidate, ...]
    recommended: Schedule | None
    provenance: Provenance
    fingerprint: str | None = None
    processor: str | None = None
    query_spread: tuple[float, ...] = ()
    key_spread: tuple[float, ...] = ()
    collapse_finding: str = ""
    recommendation: str = ""
    recommended_confidence: float | None = None
    keep: Keep | None = None
    adaptive: Keep | None = None
    skipped: tuple[str, ...] = ()
    metrics: tuple[LayerCurve, ...] = ()
    detectors: str = ""
    horizon: Horizon | None = None
    horizons: tuple[Horizon, ...] = ()
    images_needed: int | None = None
    visual_tokens: float | None = None
    weights: Weights | None = None
    format: int = RECORD_FORMAT

    def candidate_for(self, schedule: Schedule) -> Candidate | None:
        """The measurement of that schedule, if it was among the candidates."""
        return next((c for c in self.candidates if _same_cuts(c.schedule, schedule)), None)

    def random_floor(self, layer: int) -> Candidate | None:
        """The random floor at that layer, if it was measured."""
        floors = (c for c in self.candidates if c.policy == RANDOM and c.second is None)
        return next((c for c in floors if c.layer == layer), None)


def read_calibration(path: Path) -> Record:
    """Read a record and check that it is whole and makes sense.

    Raises:
        UserError: Missing, not JSON, another structure, another format, or values out of range.
    """
    return read_document(
        path,
        Record,
        what="calibration record",
        newest=RECORD_FORMAT,
        oldest=_OLDEST_FORMAT,
        hint="calibrate again with `ep-export calibrate`",
        check=_check,
    )


def write_calibration(path: Path, record: Record) -> None:
    """Write a record, aside first and then renamed.

    Raises:
        UserError: The directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_document(path, record)
    except OSError as error:
        message = f"calibration record {path} cannot be written: {error.strerror or reason(error)}"
        raise UserError(message, hint="give an --out you may write to") from error


def _same_cuts(one: Schedule, other: Schedule) -> bool:
    """Whether they cut alike; the share of a single cut is the keep's business."""
    if len(one.cuts) == len(other.cuts) == 1:
        (a,), (b,) = one.cuts, other.cuts
        return (a.layer, a.chooser) == (b.layer, b.chooser)
    return one == other


def _check(record: Record) -> None:
    """What the types alone do not say.

    Raises:
        ValueError: A cut that is impossible, an unknown policy, or a curve of the wrong length.
    """
    for name in ("query_entropy", "key_entropy", "query_spread", "key_spread"):
        values = getattr(record, name)
        if len(values) not in {0, record.layers}:
            raise ValueError(f"{name} has {len(values)} values for {record.layers} layers")
    for curve in record.metrics:
        if len(curve.values) != record.layers or len(curve.spread) != record.layers:
            raise ValueError(f"{curve.metric} has {len(curve.values)} values for {record.layers} layers")
    for horizon in (record.horizon, *record.horizons):
        if horizon is not None:
            _check_horizon(horizon, record.layers)
    if record.ecl is not None and not 1 <= record.ecl < record.layers:
        raise ValueError(f"ecl is {record.ecl}, expected 1 to {record.layers - 1}")
    try:
        schedules = [candidate.schedule for candidate in record.candidates]
        schedules += [] if record.recommended is None else [record.recommended]
        for schedule in schedules:
            check_schedule(schedule, record.layers)
    except UserError as error:
        raise ValueError(str(error)) from error


def _check_horizon(horizon: Horizon, layers: int) -> None:
    """See `_check`."""
    for curve in (horizon.half, horizon.everything):
        if not len(curve.layers) == len(curve.kl) == len(curve.kl_high) == len(curve.top1_agreement):
            raise ValueError("a horizon's curve has figures for other layers than it names")
        named = [*curve.layers, *([] if curve.horizon is None else [curve.horizon])]
        if not all(1 <= layer < layers for layer in named):
            raise ValueError(f"a horizon names a layer that is not 1 to {layers - 1}")

"""The calibration record: what was measured, or published, about where and how to prune one model.

A frozen structure as strict JSON: read with distrust, written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ep_export.documents import read_document, write_document
from ep_export.errors import UserError, reason
from ep_export.plan import check_schedule
from ep_export.policy import Cut, EvidenceKind, Keep, Random, Schedule, chooser_named

__all__ = [
    "RANDOM",
    "RECORD_FORMAT",
    "Candidate",
    "Provenance",
    "Record",
    "read_calibration",
    "write_calibration",
]

RECORD_FORMAT = 2
RANDOM = Random().name
"""Policy of the floor: tokens kept at random, several draws averaged."""


@dataclass(frozen=True)
class Candidate:
    """How one cut compares with the unpruned model on the pictures.

    Attributes:
        layer: K.
        policy: Name of its chooser; "random" for the floor.
        keep: Average over layers that was measured, as a ratio.
        kl: Mean KL(full || pruned) in nats over the answer positions, each picture weighing the same.
        kl_low: Lower end of its 95% interval over pictures (bootstrap).
        kl_high: Upper end.
        top1_agreement: Share of answer positions where both models would say the same token.
    """

    layer: int
    policy: str
    keep: float
    kl: float
    top1_agreement: float
    kl_low: float | None = None
    kl_high: float | None = None

    def is_cut(self, cut: Cut) -> bool:
        """Whether this measured that cut."""
        return (self.layer, self.policy) == (cut.layer, cut.chooser.name)


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
        skipped: Files that could not be used, with the reason.
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
    skipped: tuple[str, ...] = ()
    format: int = RECORD_FORMAT

    def candidate_for(self, schedule: Schedule) -> Candidate | None:
        """The measurement of that schedule, if it is one cut that was among the candidates."""
        if len(schedule.cuts) != 1:
            return None
        return next((c for c in self.candidates if c.is_cut(schedule.cuts[0])), None)

    def random_floor(self, layer: int) -> Candidate | None:
        """The random floor at that layer, if it was measured."""
        return next((c for c in self.candidates if c.policy == RANDOM and c.layer == layer), None)


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
        oldest=RECORD_FORMAT,
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


def _check(record: Record) -> None:
    """What the types alone do not say.

    Raises:
        ValueError: A cut that is impossible, an unknown policy, or a curve of the wrong length.
    """
    for name in ("query_entropy", "key_entropy", "query_spread", "key_spread"):
        curve = getattr(record, name)
        if len(curve) not in {0, record.layers}:
            raise ValueError(f"{name} has {len(curve)} values for {record.layers} layers")
    if record.ecl is not None and not 1 <= record.ecl < record.layers:
        raise ValueError(f"ecl is {record.ecl}, expected 1 to {record.layers - 1}")
    try:
        schedules = [Schedule((Cut(c.layer, chooser_named(c.policy)),)) for c in record.candidates]
        schedules += [] if record.recommended is None else [record.recommended]
        for schedule in schedules:
            check_schedule(schedule, record.layers)
    except UserError as error:
        raise ValueError(str(error)) from error

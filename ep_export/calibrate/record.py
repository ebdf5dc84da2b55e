"""The calibration record: what was measured, or published, about where and how to prune one model.

A frozen structure as strict JSON: read with distrust, written whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ep_export.documents import read_document, write_document
from ep_export.errors import UserError
from ep_export.policy import EvidenceKind, Keep, Policy, Scorer, Select

__all__ = ["RANDOM", "RECORD_FORMAT", "Candidate", "Provenance", "Record", "read_record", "write_record"]

RECORD_FORMAT = 1
RANDOM = "random"
"""Scorer name of the floor: tokens kept at random, several seeds averaged."""


@dataclass(frozen=True)
class Candidate:
    """How one way of pruning compares with the unpruned model on the pictures.

    Attributes:
        layer: K.
        scorer: A `Scorer` value, or "random" for the floor.
        select: Which end of the scores is kept; None for random.
        keep: Average over layers that was measured, as a ratio.
        kl: Mean KL(full || pruned) in nats over the answer positions, each picture weighing the same.
        kl_low: Lower end of its 95% interval over pictures (bootstrap).
        kl_high: Upper end.
        top1_agreement: Share of answer positions where both models would say the same token.
    """

    layer: int
    scorer: str
    select: Select | None
    keep: float
    kl: float
    top1_agreement: float
    kl_low: float | None = None
    kl_high: float | None = None

    def is_policy(self, policy: Policy) -> bool:
        """Whether this measured that policy (candidates score the queries, jointly over pictures)."""
        return (self.layer, self.scorer, self.select) == (policy.layer, policy.scorer.value, policy.select)


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
    """Everything calibration found out about one model.

    Attributes:
        model: Alias, hub id or directory name.
        layers: L.
        query_entropy: [L] mean layer entropy of the visual tokens' queries, in nats; empty when not measured.
        key_entropy: [L] the same of the keys.
        images: Pictures the means are over.
        ecl: The Entropy Collapse Layer K, None when there is no collapse.
        confidence: Share of bootstrap resamples of the pictures with the sharpest drop at the same layer.
        candidates: The fidelity table, empty when not measured.
        recommended: The policy to use, None when nothing beats random.
        provenance: Where this comes from.
        fingerprint: `Checkpoint.fingerprint` of the measured weights.
        query_spread: [L] standard deviation over pictures.
        key_spread: [L] the same of the keys.
        collapse_finding: One sentence: why there is or is no collapse.
        recommendation: One sentence: why this policy, or none.
        recommended_confidence: Share of bootstrap resamples in which the recommended policy is the best one.
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
    recommended: Policy | None
    provenance: Provenance
    fingerprint: str | None = None
    query_spread: tuple[float, ...] = ()
    key_spread: tuple[float, ...] = ()
    collapse_finding: str = ""
    recommendation: str = ""
    recommended_confidence: float | None = None
    keep: Keep | None = None
    skipped: tuple[str, ...] = ()
    format: int = RECORD_FORMAT

    def candidate_for(self, policy: Policy) -> Candidate | None:
        """The measurement of that policy, if it was one of the candidates."""
        from ep_export.policy import Source

        if policy.source is not Source.QUERY:
            return None
        return next((c for c in self.candidates if c.is_policy(policy)), None)

    def random_floor(self, layer: int) -> Candidate | None:
        """The random floor at that layer, if it was measured."""
        return next((c for c in self.candidates if c.scorer == RANDOM and c.layer == layer), None)


def read_record(path: Path) -> Record:
    """Read a record and check that it is whole and makes sense.

    Raises:
        UserError: Missing, not JSON, another structure, a newer format, or values out of range.
    """
    hint = "make one with `ep-export calibrate`"
    return read_document(
        path, Record, what="calibration record", newest=RECORD_FORMAT, hint=hint, check=_check
    )


def write_record(path: Path, record: Record) -> None:
    """Write a record, aside first and then renamed.

    Raises:
        UserError: The directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_document(path, record)
    except OSError as error:
        message = f"calibration record {path} cannot be written: {error.strerror}"
        raise UserError(message, hint="give an --out you may write to") from error


def _check(record: Record) -> None:
    """What the types alone do not say.

    Raises:
        ValueError: A layer out of range, an unknown scorer, or a curve of the wrong length or not finite.
    """
    for name in ("query_entropy", "key_entropy", "query_spread", "key_spread"):
        curve = getattr(record, name)
        if len(curve) not in {0, record.layers}:
            raise ValueError(f"{name} has {len(curve)} values for {record.layers} layers")
        if not all(math.isfinite(value) for value in curve):
            raise ValueError(f"{name} has values that are not finite")
    layers = [candidate.layer for candidate in record.candidates]
    layers += [record.recommended.layer] if record.recommended else []
    layers += [record.ecl] if record.ecl is not None else []
    if any(not 1 <= layer < record.layers for layer in layers):
        raise ValueError(f"layer {max(layers)} or {min(layers)} is outside 1 to {record.layers - 1}")
    scorers = {RANDOM, *(scorer.value for scorer in Scorer)}
    for candidate in record.candidates:
        if candidate.scorer not in scorers:
            raise ValueError(f"scorer {candidate.scorer!r} is unknown")

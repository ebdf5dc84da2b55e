"""What a validation found: one verdict a stage, each with its error, its tolerance and the reason for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ep_export.documents import encode
from ep_export.numerics import RoundingCost
from ep_export.planning import Pair
from ep_export.runtime import KeptPicture

__all__ = ["Case", "Report", "Stage", "Verdict", "text_lines", "to_json"]


class Verdict(str, Enum):
    """Worst last: a report is as good as its worst stage."""

    PASS = "PASS"  # noqa: S105 - not a password
    AMBIGUOUS = "AMBIGUOUS"  # differs only where the oracle itself hardly prefers one answer
    FAIL = "FAIL"

    @property
    def rank(self) -> int:
        """0 for the best."""
        return list(Verdict).index(self)


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline compared with the oracle over all cases.

    Attributes:
        name: The stage.
        verdict: The worst of its comparisons.
        max_abs_error: Largest absolute difference, in the unit the note names; that of the comparison
            nearest to (or furthest beyond) its tolerance.
        tolerance: What that comparison was allowed.
        relative_error: `max_abs_error` over the largest magnitude of the reference.
        reason: Why the tolerance is what it is.
        note: Where the worst comparison was, or what differs.
        comparisons: How many arrays were compared.
    """

    name: str
    verdict: Verdict
    max_abs_error: float
    tolerance: float
    relative_error: float
    reason: str
    note: str
    comparisons: int


@dataclass(frozen=True)
class Case:
    """One prompt and what came of it.

    Attributes:
        name: As the stages' notes call it.
        prompt: The question.
        answer: The bundle's greedy answer.
        reference_answer: The oracle's, given the bundle's kept sets.
        unpruned_answer: The oracle's with every visual token.
        prompt_tokens: S.
        visual_tokens: N.
        kept_tokens: Visual tokens that reach the last span.
        kept_by_cut: For every cut the visual tokens that go on; empty without pictures.
        kept_overlap: Share of the tokens the oracle itself would keep, of those that arrive at a cut in the
            bundle, that the bundle keeps; the mean over cuts, 1 without pictures.
        pictures: What was kept of each picture, or part of a video.
        first_token_flops: Vision encoder and prefill, full and pruned.
        prefill_flops: The decoder's share of them.
    """

    name: str
    prompt: str
    answer: str
    reference_answer: str
    unpruned_answer: str
    prompt_tokens: int
    visual_tokens: int
    kept_tokens: int
    kept_by_cut: tuple[int, ...]
    kept_overlap: float
    pictures: tuple[KeptPicture, ...]
    first_token_flops: Pair
    prefill_flops: Pair


@dataclass(frozen=True)
class Report:
    """Everything `validate` found.

    Attributes:
        subject: What was validated, e.g. the bundle's model.
        settings: Name -> value of what a reader needs to judge it (policies, keep, precision, ...).
        policies: Choosers that were validated, cut by cut; empty where nothing was chosen.
        stages: In the order of the pipeline.
        cases: The prompts.
        rounding: What quantised weights cost beside pruning; empty where none are, or where the checkpoint
            was published quantised.
    """

    subject: str
    settings: Mapping[str, str]
    stages: tuple[Stage, ...]
    cases: tuple[Case, ...] = ()
    policies: tuple[str, ...] = ()
    rounding: tuple[RoundingCost, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst stage's."""
        return max((stage.verdict for stage in self.stages), key=lambda v: v.rank, default=Verdict.FAIL)

    @property
    def kept_overlap(self) -> float:
        """Mean over the cases that have pictures; 1 when none has."""
        shares = [case.kept_overlap for case in self.cases if case.visual_tokens]
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def sentence(self) -> str:
        """For the bundle's manifest and the last line of a log."""
        bad = [stage.name for stage in self.stages if stage.verdict is not Verdict.PASS]
        where = f" at {', '.join(bad)}" if bad else ""
        pruned = f" pruned by {', '.join(dict.fromkeys(self.policies))}" if self.policies else ""
        return (
            f"{self.verdict.value}{where}: {len(self.stages)} stages over {len(self.cases)} prompts against "
            f"Hugging Face{pruned}, kept sets overlap {self.kept_overlap:.4f}"
        )


def to_json(report: Report) -> dict[str, Any]:
    """Plain JSON values; numbers that are not finite become null."""
    raw = encode(report)
    head = {"verdict": report.verdict.value, "kept_overlap": report.kept_overlap}
    return {**head, **_finite(raw)}


def text_lines(report: Report) -> list[str]:
    """A table for a terminal; its meaning does not depend on colour."""
    width = max((len(stage.name) for stage in report.stages), default=5)
    lines = [f"{'stage':<{width}}  {'verdict':<9}  {'error':>9}  {'allowed':>9}  note"]
    for s in report.stages:
        figures = f"{s.max_abs_error:>9.2e}  {s.tolerance:>9.2e}"
        lines.append(f"{s.name:<{width}}  {s.verdict.value:<9}  {figures}  {s.note}".rstrip())
    lines += [
        f"{each.variant}: KL {each.kl:.2g}, top-1 agreement {each.agreement:.1%} with the model as it was"
        for each in report.rounding
    ]
    return [*lines, report.sentence]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if abs(value) <= 1.7e308 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value

"""Compare arrays with the oracle's and fold many comparisons into one stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_export.validate.report import Stage, Verdict
from ep_export.validate.tolerance import Tolerance

__all__ = ["Comparison", "Finding", "compare", "fold"]


@dataclass(frozen=True)
class Comparison:
    """One array, or one decision, against the oracle's.

    Attributes:
        verdict: Its verdict.
        error: Largest absolute difference; infinite where it has no meaning (shape, non-finite).
        tolerance: What was allowed.
        scale: Largest magnitude of the reference; 1 for decisions.
        where: Case and tensor.
        note: What differs, when it does.
    """

    verdict: Verdict
    error: float
    tolerance: float
    scale: float
    where: str
    note: str = ""

    @property
    def severity(self) -> tuple[int, float]:
        """Orders comparisons: the verdict first, then how much of the tolerance is used."""
        if self.error == 0:
            return self.verdict.rank, 0.0
        return self.verdict.rank, self.error / self.tolerance if self.tolerance > 0 else math.inf


@dataclass(frozen=True)
class Finding:
    """What one case shows about one stage.

    Attributes:
        stage: The stage's name.
        comparisons: Empty when the case has nothing of the kind.
        reason: Of the tolerances used.
    """

    stage: str
    comparisons: tuple[Comparison, ...]
    reason: str


def compare(where: str, got: NDArray[Any], want: NDArray[Any], tolerance: Tolerance) -> Comparison:
    """Largest absolute difference of two arrays of the same shape, in float64.

    Args:
        where: Case and tensor, for the report.
        got: The bundle's.
        want: The oracle's.
        tolerance: Allowed for a reference of this scale.
    """
    if got.shape != want.shape:
        note = f"shape is {list(got.shape)}, expected {list(want.shape)}"
        return Comparison(Verdict.FAIL, math.inf, 0.0, 1.0, where, note)
    if not want.size:
        return Comparison(Verdict.PASS, 0.0, 0.0, 1.0, where)
    reference = want.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf: told below
        error = float(np.abs(got.astype(np.float64) - reference).max())
    scale = float(np.abs(reference).max())
    allowed = tolerance.allowed(scale)
    if not math.isfinite(error):
        return Comparison(Verdict.FAIL, math.inf, allowed, scale, where, "holds values that are not finite")
    verdict = Verdict.PASS if error <= allowed else Verdict.FAIL
    return Comparison(verdict, error, allowed, scale, where)


def fold(findings: Sequence[Finding]) -> Stage:
    """One stage from what all cases show about it: the worst comparison decides, its place is the note.

    Args:
        findings: Of the same stage, at least one.
    """
    name, reason = findings[0].stage, findings[0].reason
    comparisons = [comparison for finding in findings for comparison in finding.comparisons]
    if not comparisons:
        return Stage(name, Verdict.PASS, 0.0, 0.0, 0.0, reason, "nothing to compare in these prompts", 0)
    worst = max(comparisons, key=lambda c: c.severity)
    reason = next(finding.reason for finding in findings if worst in finding.comparisons)
    relative = worst.error / worst.scale if worst.scale > 0 else worst.error
    return Stage(
        name,
        worst.verdict,
        worst.error,
        worst.tolerance,
        relative,
        reason,
        _note(worst, sum(c.verdict is not Verdict.PASS for c in comparisons)),
        len(comparisons),
    )


def _note(worst: Comparison, different: int) -> str:
    if worst.verdict is Verdict.PASS and worst.error == 0:
        return "no difference at all"
    more = f" (and {different - 1} more)" if different > 1 else ""
    return (f"{worst.where}: {worst.note}" if worst.note else f"worst: {worst.where}") + more

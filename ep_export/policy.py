"""What decides which visual tokens stay: the policy, and the evidence it stands on.

A policy is data: the calibrator recommends one, the plan turns it into budgets, the exporter writes
it into the EntropyPrune node and the manifest, the oracle follows it in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = [
    "DEFAULT_DEGREE",
    "DEGREES",
    "Budget",
    "Evidence",
    "EvidenceKind",
    "Keep",
    "Policy",
    "Scorer",
    "Select",
    "Source",
]


DEGREES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Of the entropy series: twice the degree halves its error and costs one more matrix product a token."""

DEFAULT_DEGREE = 512
"""Measured on the trained model against exact eigenvalues (paper, 200 questions): under 0.01 % of the
kept tokens are swapped, and scores move by 1e-5 nats against each other."""


class Scorer(str, Enum):
    """How one visual token's heads become one number (see `ep_export.entropy.scores`)."""

    PAPER = "paper"  # rows of the centred heads normalised, von Neumann entropy (Eqs. 10-14)
    RELEASED = "released"  # the authors' released code: no row normalisation, divided by ln H
    ORDER2 = "order2"  # Renyi entropy of order 2: -ln tr(A^2), the cheapest
    NORM = "norm"  # L2 norm of the token's states: the plain rival


class Select(str, Enum):
    """Which end of the scores is kept."""

    HIGHEST = "highest"
    LOWEST = "lowest"


class Source(str, Enum):
    """Which states of layer K-1 are scored, all before rotary embedding."""

    QUERY = "query"  # q_proj output, [heads, head_dim]
    KEY = "key"  # k_proj output, [kv_heads, head_dim]
    VALUE = "value"  # v_proj output, [kv_heads, head_dim]
    HIDDEN = "hidden"  # output of layer K-1, viewed as [heads, hidden_size / heads]


class Budget(str, Enum):
    """Whether several pictures compete for one budget or each keeps its share."""

    JOINT = "joint"
    PER_PICTURE = "per_picture"


@dataclass(frozen=True)
class Policy:
    """Where and how visual tokens are pruned.

    Attributes:
        layer: K, the Entropy Collapse Layer: layers 0..K-1 see every visual token. 1 <= K < L.
        scorer: The token score.
        select: Which end of the scores is kept.
        source: The states that are scored.
        budget: Joint over all pictures of a prompt, or per picture.
    """

    layer: int
    scorer: Scorer = Scorer.PAPER
    select: Select = Select.HIGHEST
    source: Source = Source.QUERY
    budget: Budget = Budget.JOINT

    def __str__(self) -> str:
        parts = f"{self.scorer.value}, {self.select.value}, {self.source.value} states"
        extra = ", per picture" if self.budget is Budget.PER_PICTURE else ""
        return f"layer {self.layer}, {parts}{extra}"


class EvidenceKind(str, Enum):
    """Where a policy comes from."""

    PUBLISHED = "published"  # a paper or its code, not measured here
    MEASURED = "measured"  # a calibration record on pictures
    TOLD = "told"  # the command line; nothing measured it on this model


@dataclass(frozen=True)
class Evidence:
    """Why a policy is used: printed by `build`, kept in the manifest.

    Attributes:
        kind: Published, measured or told.
        summary: One sentence a person can check.
        record: File name of the calibration record, when there is one.
    """

    kind: EvidenceKind
    summary: str
    record: str | None = None


@dataclass(frozen=True)
class Keep:
    """How much to keep, as an average over all layers; exactly one of the two is set.

    Attributes:
        ratio: Fraction of the visual tokens, 0 < ratio <= 1.
        tokens: Number of visual tokens.
    """

    ratio: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.ratio:g}" if self.ratio is not None else f"{self.tokens} tokens"

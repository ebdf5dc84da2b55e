"""What decides which visual tokens stay: choosers, cuts, schedules, and the evidence they stand on.

A schedule is data: the calibrator recommends one, the plan turns it into budgets, the exporter writes its
choosers as components of a bundle, the oracle follows it in PyTorch. What a chooser computes is in
`ep_export.choosers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from ep_export.errors import UsageError

__all__ = [
    "DEFAULT_DEGREE",
    "DEGREES",
    "Budget",
    "Chooser",
    "Cut",
    "Evidence",
    "EvidenceKind",
    "Keep",
    "Kind",
    "MaxMin",
    "Nothing",
    "Random",
    "Schedule",
    "Scorer",
    "Select",
    "Source",
    "TopK",
    "chooser_named",
]


DEGREES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Of the entropy series: twice the degree halves its error and costs one more matrix product a token."""

DEFAULT_DEGREE = 256
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
    """Which states are scored; those of layer K-1, K the cut's layer, all before rotary embedding."""

    QUERY = "query"  # q_proj output, [heads, head_dim]
    KEY = "key"  # k_proj output, [kv_heads, head_dim]
    VALUE = "value"  # v_proj output, [kv_heads, head_dim]
    HIDDEN = "hidden"  # what enters layer K, viewed as [heads, hidden_size / heads]


class Budget(str, Enum):
    """Whether several pictures compete for one budget or each keeps its share."""

    JOINT = "joint"
    PER_PICTURE = "per_picture"


class Kind(str, Enum):
    """Tag of a chooser in JSON."""

    TOP_K = "top_k"
    MAX_MIN = "max_min"
    RANDOM = "random"
    NOTHING = "nothing"


_SEEDS = 1 << 16
_PER_PICTURE = "per-picture"


def _check_kind(kind: Kind, expected: Kind) -> None:
    if kind is not expected:
        raise ValueError(f"kind is {kind.value}, expected {expected.value}")


@dataclass(frozen=True)
class TopK:
    """Score every visual token by itself and keep the best.

    Attributes:
        scorer: The token score.
        select: Which end of the scores is kept.
        source: The states that are scored.
        budget: Joint over all pictures of a prompt, or per picture.
        kind: Always `Kind.TOP_K`.
    """

    scorer: Scorer = Scorer.PAPER
    select: Select = Select.HIGHEST
    source: Source = Source.QUERY
    budget: Budget = Budget.JOINT
    kind: Kind = Kind.TOP_K

    def __post_init__(self) -> None:
        _check_kind(self.kind, Kind.TOP_K)

    @property
    def name(self) -> str:
        """E.g. `paper-highest`, `released-lowest-key-per-picture`: what `chooser_named` reads."""
        parts = [self.scorer.value, self.select.value]
        parts += [] if self.source is Source.QUERY else [self.source.value]
        parts += [] if self.budget is Budget.JOINT else [_PER_PICTURE]
        return "-".join(parts)

    def __str__(self) -> str:
        extra = ", per picture" if self.budget is Budget.PER_PICTURE else ""
        return f"{self.scorer.value}, {self.select.value}, {self.source.value} states{extra}"


@dataclass(frozen=True)
class MaxMin:
    """DivPrune (arXiv 2503.02175): keep tokens that are far from each other, by cosine distance.

    On the hidden states that enter the cut's layer; at layer 0 these are the visual embeddings, as its
    authors have it.
    """

    kind: Kind = Kind.MAX_MIN

    def __post_init__(self) -> None:
        _check_kind(self.kind, Kind.MAX_MIN)

    @property
    def name(self) -> str:
        """What `chooser_named` reads."""
        return "divprune"

    def __str__(self) -> str:
        return "DivPrune: hidden states far from each other"


@dataclass(frozen=True)
class Random:
    """Keep tokens drawn without looking: the floor, and past the information horizon as good as any.

    Attributes:
        seed: Of the draw; the same in every runtime. 0 to 2^16 - 1.
        kind: Always `Kind.RANDOM`.
    """

    seed: int = 0
    kind: Kind = Kind.RANDOM

    def __post_init__(self) -> None:
        _check_kind(self.kind, Kind.RANDOM)
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed is {self.seed}, expected 0 to {_SEEDS - 1}")

    @property
    def name(self) -> str:
        """E.g. `random`, `random-7`: what `chooser_named` reads."""
        return f"random-{self.seed}" if self.seed else "random"

    def __str__(self) -> str:
        return f"random tokens, seed {self.seed}"


@dataclass(frozen=True)
class Nothing:
    """Keep no visual token: for cuts so deep that the text has taken up what it needs."""

    kind: Kind = Kind.NOTHING

    def __post_init__(self) -> None:
        _check_kind(self.kind, Kind.NOTHING)

    @property
    def name(self) -> str:
        """What `chooser_named` reads."""
        return "nothing"

    def __str__(self) -> str:
        return "no visual token"


Chooser: TypeAlias = TopK | MaxMin | Random | Nothing
"""Which of a cut's visual tokens stay. Its `name` is the policy's name everywhere."""


def chooser_named(name: str) -> Chooser:
    """The chooser of that name; the inverse of `Chooser.name`.

    Raises:
        UsageError: No chooser is called so.
    """
    for parse in (_plain, _random, _top_k):
        try:
            chooser = parse(name)
        except ValueError:
            continue
        if chooser.name == name:  # one spelling each
            return chooser
    raise UsageError(
        f"policy {name!r} is unknown",
        hint=f"{', '.join(s.value for s in Scorer)}, each with -highest or -lowest and, if wanted, -key, "
        "-value, -hidden and -per-picture; divprune; random, random-SEED; nothing",
    )


@dataclass(frozen=True)
class Cut:
    """Where visual tokens are dropped, and which.

    Attributes:
        layer: K: layers before it see the tokens that came so far, it and those after it what is kept. With
            0 the decoder never sees the rest.
        chooser: Which tokens stay.
        share: Of the prompt's visual tokens, how many go on: k = max(1, floor(share N)), and 0 for `Nothing`.
            None in a schedule of one cut, where the keep alone decides.
    """

    layer: int
    chooser: Chooser = TopK()
    share: float | None = None

    def __str__(self) -> str:
        share = "" if self.share is None else f" keeps {100 * self.share:.4g}%"
        return f"layer {self.layer}{share}, {self.chooser}"


@dataclass(frozen=True)
class Schedule:
    """The cuts of a model, from the first layer to the last; checked by `ep_export.plan.check_schedule`."""

    cuts: tuple[Cut, ...]

    def __str__(self) -> str:
        return "; then ".join(str(cut) for cut in self.cuts)

    def spans(self, layers: int) -> tuple[range, ...]:
        """Layers between the cuts, in order; none is empty."""
        ends = [0, *(cut.layer for cut in self.cuts), layers]
        return tuple(range(a, b) for a, b in itertools.pairwise(ends) if a < b)

    def with_choosers(self, choosers: Sequence[Chooser]) -> Schedule:
        """The same cuts with another chooser each; a share goes where nothing is kept."""
        return Schedule(
            tuple(
                replace(cut, chooser=chooser, share=None if isinstance(chooser, Nothing) else cut.share)
                for cut, chooser in zip(self.cuts, choosers, strict=True)
            )
        )


class EvidenceKind(str, Enum):
    """Where a schedule comes from."""

    PUBLISHED = "published"  # a paper or its code, not measured here
    MEASURED = "measured"  # a calibration record on pictures
    TOLD = "told"  # the command line; nothing measured it on this model


@dataclass(frozen=True)
class Evidence:
    """Why a schedule is used: printed by `build`, kept in the manifest.

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


def _plain(name: str) -> Chooser:
    """Raises ValueError where `name` is none of a chooser without settings."""
    for kind in (MaxMin, Nothing, Random):
        if kind().name == name:
            return kind()
    raise ValueError(name)


def _random(name: str) -> Random:
    """Raises ValueError where `name` is not that of a Random with a seed."""
    return Random(int(name.removeprefix("random-")))


def _top_k(name: str) -> TopK:
    """Raises ValueError where `name` is not that of a TopK."""
    rest, per_picture, _ = name.partition(f"-{_PER_PICTURE}")
    scorer, select, *source = rest.split("-")
    return TopK(
        Scorer(scorer),
        Select(select),
        Source(source[0]) if source else Source.QUERY,
        Budget.PER_PICTURE if per_picture else Budget.JOINT,
    )

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
    "ADAPTIVE",
    "DEFAULT_DEGREE",
    "DEGREES",
    "Budget",
    "Chooser",
    "Coverage",
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
    "Threshold",
    "TopK",
    "chooser_named",
    "reads_projections",
    "scored_source",
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
    """Which states are scored; those of layer K-1, K the cut's layer, projections before rotary embedding."""

    QUERY = "query"  # q_proj output, [heads, head_dim]
    KEY = "key"  # k_proj output, [kv_heads, head_dim]
    VALUE = "value"  # v_proj output, [kv_heads, head_dim]
    HIDDEN = "hidden"  # what enters layer K, viewed as [heads, hidden_size / heads]
    ATTENTION = "attention"  # what the last position attends to, after rotary embedding; one number, [1, 1]


class Budget(str, Enum):
    """Whether several pictures compete for one budget or each keeps its share."""

    JOINT = "joint"
    PER_PICTURE = "per_picture"


class Kind(str, Enum):
    """Tag of a chooser in JSON."""

    TOP_K = "top_k"
    MAX_MIN = "max_min"
    COVERAGE = "coverage"
    RANDOM = "random"
    NOTHING = "nothing"


ADAPTIVE = "adaptive"
"""What a keep is called whose prompts each have their own."""

_SEEDS = 1 << 16
_PER_PICTURE = "per-picture"
_COVERAGE = "coverage"


def _check_kind(kind: Kind, expected: Kind) -> None:
    if kind is not expected:
        raise ValueError(f"kind is {kind.value}, expected {expected.value}")


def _check_source(scorer: Scorer, source: Source) -> None:
    if source is Source.ATTENTION and scorer is not Scorer.NORM:
        raise UsageError(
            f"attention is one number a token, which has no {scorer.value} score",
            hint=f"{Scorer.NORM.value} takes it as it is: "
            f"--policy {Scorer.NORM.value} --source {Source.ATTENTION.value}",
        )


def _said(source: Source) -> str:
    return "the last token's attention" if source is Source.ATTENTION else f"{source.value} states"


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
        _check_source(self.scorer, self.source)

    @property
    def name(self) -> str:
        """E.g. `paper-highest`, `released-lowest-key-per-picture`: what `chooser_named` reads."""
        parts = [self.scorer.value, self.select.value]
        parts += [] if self.source is Source.QUERY else [self.source.value]
        parts += [] if self.budget is Budget.JOINT else [_PER_PICTURE]
        return "-".join(parts)

    def __str__(self) -> str:
        extra = ", per picture" if self.budget is Budget.PER_PICTURE else ""
        return f"{self.scorer.value}, {self.select.value}, {_said(self.source)}{extra}"


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
class Coverage:
    """Keep important tokens that are far from each other: importance times distance to what is kept.

    The importance is a token's score, scaled over the tokens of a prompt; the distance is the cosine distance
    of hidden states that `MaxMin` goes by. See `ep_export.choosers.coverage`.

    Attributes:
        scorer: The token score.
        select: Which end of the scores is important.
        source: The states that are scored.
        kind: Always `Kind.COVERAGE`.
    """

    scorer: Scorer = Scorer.PAPER
    select: Select = Select.HIGHEST
    source: Source = Source.QUERY
    kind: Kind = Kind.COVERAGE

    def __post_init__(self) -> None:
        _check_kind(self.kind, Kind.COVERAGE)
        _check_source(self.scorer, self.source)

    @property
    def name(self) -> str:
        """E.g. `coverage-norm-lowest`, `coverage-paper-highest-key`: what `chooser_named` reads."""
        return f"{_COVERAGE}-{TopK(self.scorer, self.select, self.source).name}"

    def __str__(self) -> str:
        return f"{self.select.value} {self.scorer.value} of {_said(self.source)}, far from what is kept"


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


Chooser: TypeAlias = TopK | MaxMin | Coverage | Random | Nothing
"""Which of a cut's visual tokens stay. Its `name` is the policy's name everywhere."""


def scored_source(chooser: Chooser) -> Source | None:
    """The states that a chooser scores; None where it scores none."""
    return chooser.source if isinstance(chooser, TopK | Coverage) else None


def reads_projections(chooser: Chooser) -> bool:
    """Whether a chooser scores what the layer before its cut computes, so that it cannot stand at layer 0."""
    return scored_source(chooser) not in (None, Source.HIDDEN)


def chooser_named(name: str) -> Chooser:
    """The chooser of that name; the inverse of `Chooser.name`.

    Raises:
        UsageError: No chooser is called so.
    """
    for parse in (_plain, _random, _top_k, _coverage):
        try:
            chooser = parse(name)
        except ValueError:
            continue
        if chooser.name == name:  # one spelling each
            return chooser
    raise UsageError(
        f"policy {name!r} is unknown",
        hint=f"{', '.join(s.value for s in Scorer)}, each with -highest or -lowest and, if wanted, -key, "
        "-value, -hidden and -per-picture; norm-highest-attention (FastV); coverage- and such a score, e.g. "
        "coverage-norm-lowest; divprune; random, random-SEED; nothing",
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
    """The cuts of a model, from the first layer to the last; see `ep_export.planning.check_schedule`."""

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
class Threshold:
    """How a prompt's own keep follows from its scores: a token goes on where it scores well enough.

    Attributes:
        layer: K of the only cut.
        policy: Name of its chooser, whose scores these are.
        value: The least score that is kept; the largest where the chooser keeps the lowest.
        floor: Smallest average over all layers that a prompt may come to.
        ceiling: Largest.
        pictures: How many it was fitted to, so that their average is the keep's ratio.
    """

    layer: int
    policy: str
    value: float
    floor: float
    ceiling: float
    pictures: int


@dataclass(frozen=True)
class Keep:
    """How much to keep, as an average over all layers; exactly one of ratio and tokens is set.

    Attributes:
        ratio: Fraction of the visual tokens, 0 < ratio <= 1.
        tokens: Number of visual tokens.
        adaptive: With a ratio, which is then the average over prompts: every prompt has its own.
        threshold: Of an adaptive keep; None while no calibration record has given one.
    """

    ratio: float | None = None
    tokens: int | None = None
    adaptive: bool = False
    threshold: Threshold | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.tokens} tokens"
        return f"{ADAPTIVE}:{self.ratio:g}" if self.adaptive else f"{self.ratio:g}"

    @property
    def largest(self) -> Keep:
        """The most that any prompt keeps."""
        return self if self.threshold is None else Keep(ratio=self.threshold.ceiling)


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


def _coverage(name: str) -> Coverage:
    """Raises ValueError where `name` is not that of a Coverage."""
    prefix, _, rest = name.partition("-")
    if prefix != _COVERAGE:
        raise ValueError(name)
    score = _top_k(rest)
    return Coverage(score.scorer, score.select, score.source)

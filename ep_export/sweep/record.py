"""What a sweep says: every way of pruning that was compared, on one model and one set of questions.

`sweep.json` is this structure. It holds what a report draws and a table prints, and what a paired test of any
two rows needs: who answered which question right. Pictures of the gallery lie beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ep_export.dims import DecoderDims
from ep_export.documents import read_document, write_document
from ep_export.measure.question import Skipped
from ep_export.measure.ways import WayCut
from ep_export.numerics import Weights
from ep_export.policy import Keep, Schedule
from ep_export.runtime.kept import KeptPicture
from ep_export.sweep.statistics import MeanInterval

__all__ = [
    "PAPER",
    "RANDOM",
    "RECOMMENDED",
    "SCHEDULE",
    "SWEEP_FILE",
    "SWEEP_FORMAT",
    "AnsweredQuestion",
    "Dataset",
    "Difference",
    "Entropies",
    "GalleryAnswer",
    "GalleryEntry",
    "MethodInfo",
    "Prefill",
    "Recommended",
    "RoundedUnpruned",
    "Row",
    "SameBudget",
    "SweepRecord",
    "Unpruned",
    "read_sweep",
    "write_sweep",
]

SWEEP_FORMAT = 3
SWEEP_FILE = "sweep.json"

PAPER, RANDOM = "paper-highest", "random"
RECOMMENDED = "recommended"
"""Key of what a calibration recommends, as a competitor."""
SCHEDULE = "schedule"
"""Key of the schedule that was asked for, as a competitor."""


@dataclass(frozen=True)
class Prefill:
    """Measured time of one decoder prefill, full and pruned, in one run and taking turns.

    It begins with the embeddings and ends with the last position's logits; scores and selection are inside,
    the vision encoder, the same for all, is not.

    Attributes:
        full_ms: Median over prompts and rounds.
        pruned_ms: Median over the same prompts and rounds.
        speedup: Median over prompts and rounds of the prompt's full time / pruned.
        speedup_low: 10% quantile of it over prompts and rounds.
        speedup_high: 90% quantile.
        samples: Prompts times rounds.
    """

    full_ms: float
    pruned_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    samples: int


@dataclass(frozen=True)
class Difference:
    """A row minus another, question by question: random tokens at its layer and keep, or its full weights.

    Attributes:
        accuracy: In accuracy, bootstrap over pictures and draws; None without answers.
        kl: In KL, nats; below 0 the row is closer to the full model.
        agreement: In the share of answer positions where the full model's own answer stays the top token.
    """

    accuracy: MeanInterval | None
    kl: MeanInterval
    agreement: MeanInterval

    @property
    def standing(self) -> int:
        """1 when the row beats the other, -1 when it loses, 0 when they are not told apart.

        By accuracy, by KL where no answers are known.
        """
        return self.standing_in("accuracy" if self.accuracy is not None else "kl")

    def standing_in(self, figure: str) -> int:
        """The same by one figure: "accuracy", "agreement" or "kl"; 0 where it was not measured."""
        mean: MeanInterval | None = getattr(self, figure)
        side = 0 if mean is None else mean.side
        return -side if figure == "kl" else side


class SameBudget(str, Enum):
    """What ways of one keep have in common. Pruned ones have both: their vision encoder costs the same."""

    AVERAGE = "average"  # visual tokens, averaged over all layers
    FIRST_TOKEN = "first_token"  # noqa: S105 - FLOPs up to the first token alone: a picture scaled down by less

    @property
    def words(self) -> str:
        """For the heading of a table."""
        return "average tokens" if self is SameBudget.AVERAGE else "FLOPs up to the first token"


@dataclass(frozen=True)
class Row:
    """One way of pruning.

    Attributes:
        method: Key of its `MethodInfo`; with rounded weights it ends in their name, e.g. "divprune@int4".
        layer: K of its first cut: layers 0..K-1 see every visual token. 0 prunes before the decoder, or
            scales the picture down.
        keep: Average share of visual tokens over all layers.
        cuts: Where tokens are dropped, and by which method; none where the picture is scaled down.
        published: Whether `layer` is where the method's authors prune (None: they leave it open).
        seeds: Random draws a question was measured with; 1 for a method without chance.
        accuracy: Exact answers; None without answers. Over pictures and draws where there are several.
        agreement: Share of answer positions where the full model's own answer stays the top token.
        kl: KL(full || pruned) in nats, mean over answer positions, then over questions. Full is the unpruned
            model of full weights, whatever the row's are.
        kept_tokens: Mean visual tokens that go on after every cut.
        flops: Mean prefill FLOPs of the decoder layers.
        first_token_flops: Mean of the same with the vision encoder.
        kv_bytes: Mean cache of the visual tokens in float16.
        prefill: Measured time; None where it was not measured.
        right: A string a draw, a character a question in the order of `SweepRecord.questions`: "1" right, "0"
            wrong. Empty without answers.
        over_random: Paired difference from random tokens on the same weights; None for these, and where there
            are none.
        below_best: By how much the best row of this keep is better, paired, in what rows are ranked by; None
            for that row.
        budget: What the row has in common with the others of this keep.
        weights: Name of the rounded weights it was measured on, of `SweepRecord.rounded`; None is the full
            ones.
        over_full_weights: Paired difference from the same row on full weights; None for these.
    """

    method: str
    layer: int
    keep: float
    cuts: tuple[WayCut, ...]
    published: bool | None
    seeds: int
    accuracy: MeanInterval | None
    agreement: MeanInterval
    kl: MeanInterval
    kept_tokens: tuple[float, ...]
    flops: float
    first_token_flops: float
    kv_bytes: float
    prefill: Prefill | None
    right: tuple[str, ...]
    over_random: Difference | None
    below_best: MeanInterval | None = None
    budget: SameBudget = SameBudget.AVERAGE
    weights: str | None = None
    over_full_weights: Difference | None = None

    @property
    def measure(self) -> MeanInterval:
        """What rows are ranked by: accuracy where answers are known, else agreement with the full model."""
        return self.accuracy if self.accuracy is not None else self.agreement

    def belongs(self, budget: SameBudget) -> bool:
        """Whether the row has that in common with the others of its keep: pruned ones have both."""
        return bool(self.cuts) or self.budget is budget

    @property
    def tied(self) -> bool:
        """Whether the best row of this keep is not told apart from it."""
        return self.below_best is None or self.below_best.side <= 0


@dataclass(frozen=True)
class Unpruned:
    """The model without pruning, on the same questions.

    Attributes:
        accuracy: Exact answers; None without answers.
        right: A character a question, as in `Row.right`; empty without answers.
        visual_tokens: Mean N.
        text_tokens: Mean of the other prompt tokens.
        flops: Mean prefill FLOPs of the decoder layers.
        first_token_flops: Mean of the same with the vision encoder.
        kv_bytes: Mean cache of the visual tokens in float16.
        prefill_ms: Median measured decoder prefill; None where it was not measured.
    """

    accuracy: MeanInterval | None
    right: str
    visual_tokens: float
    text_tokens: float
    flops: float
    first_token_flops: float
    kv_bytes: float
    prefill_ms: float | None


@dataclass(frozen=True)
class RoundedUnpruned:
    """The model with rounded weights and every visual token, against the one with full weights.

    Attributes:
        name: As in `Row.weights`, e.g. "int4".
        weights: What linear layers of the decoder are stored in, and how they were rounded.
        accuracy: Exact answers; None without answers.
        agreement: As in `Row`.
        kl: As in `Row`.
        right: A character a question, as in `Row.right`; empty without answers.
    """

    name: str
    weights: Weights
    accuracy: MeanInterval | None
    agreement: MeanInterval
    kl: MeanInterval
    right: str


@dataclass(frozen=True)
class Entropies:
    """Layer entropies over the sweep's pictures, and whether they collapse.

    Attributes:
        query: [L] nats, mean over pictures.
        key: [L] nats.
        query_spread: [L] standard deviation over pictures.
        key_spread: [L].
        pictures: How many.
        collapse: The Entropy Collapse Layer; None when there is none.
        confidence: Share of resamples in which the largest drop is at the same layer.
        finding: One sentence.
    """

    query: tuple[float, ...]
    key: tuple[float, ...]
    query_spread: tuple[float, ...]
    key_spread: tuple[float, ...]
    pictures: int
    collapse: int | None
    confidence: float
    finding: str


@dataclass(frozen=True)
class MethodInfo:
    """A method as the sweep ran it.

    Attributes:
        key: Short name, unique, e.g. "dart"; of a policy its name.
        title: Name for people, e.g. "FastV".
        source: Citation: arXiv number or where it comes from.
        idea: One sentence: what it keeps.
        ours: Whether a bundle of ep-export can prune this way.
    """

    key: str
    title: str
    source: str
    idea: str
    ours: bool


@dataclass(frozen=True)
class Recommended:
    """What a calibration recommended for one keep, before any question of this sweep was asked.

    Attributes:
        keep: For this average.
        schedule: None when nothing beat random tokens.
        reason: The calibration's sentence.
        pictures: Calibration pictures.
        source: Name of the calibration's pictures or record.
        held_out: Whether no calibration picture is among the sweep's; None where that is not known, as with
            a record from elsewhere.
        best_method: Key of the method that was best on this sweep, in hindsight, among all that a bundle can
            prune by at this keep; None without a schedule.
        best_layer: Its K.
        regret_kl: KL of the recommended row minus that row's, paired; 0 when it is the best.
        regret_accuracy: Accuracy of the row most accurate in hindsight minus the recommended row's, paired;
            None without answers.
        threshold: The keep by which every prompt has its own, and the cut it is for; None where the record
            has none.
    """

    keep: float
    schedule: Schedule | None
    reason: str
    pictures: int
    source: str
    held_out: bool | None
    best_method: str | None = None
    best_layer: int | None = None
    regret_kl: MeanInterval | None = None
    regret_accuracy: MeanInterval | None = None
    threshold: Keep | None = None


@dataclass(frozen=True)
class Dataset:
    """What was asked.

    Attributes:
        name: Name of the picture folder.
        questions: How many were used.
        pictures: Different pictures among them.
        answers: Whether right answers were given (accuracy) or the model's own stand in (fidelity only).
        skipped: What could not be used.
        sha256: Over pictures, questions and answers in order.
    """

    name: str
    questions: int
    pictures: int
    answers: bool
    skipped: tuple[Skipped, ...]
    sha256: str


@dataclass(frozen=True)
class AnsweredQuestion:
    """One question of the sweep.

    Attributes:
        picture: Path relative to the folder.
        question: As asked.
        answer: The right one; None where none is known.
        full_answer: What the unpruned model says.
        kind: What the prompts call its kind; None where they do not.
    """

    picture: str
    question: str
    answer: str | None
    full_answer: str
    kind: str | None = None


@dataclass(frozen=True)
class GalleryAnswer:
    """What one row answered on a gallery picture.

    Attributes:
        method: Key.
        layer: K of its first cut.
        keep: Average.
        answer: Generated text.
        right: Whether it is the right answer; None where none is known.
        same: Whether it is the unpruned model's.
        kept: What was kept of every part of the picture (most families have one, tiled ones several).
    """

    method: str
    layer: int
    keep: float
    answer: str
    right: bool | None
    kept: tuple[KeptPicture, ...]
    same: bool = False


@dataclass(frozen=True)
class GalleryEntry:
    """A picture with what every method kept of it, chosen evenly over the questions and not by outcome.

    Attributes:
        picture: Path relative to `sweep.json`.
        sha256: Of that file.
        question: As asked.
        answer: The right one; None where none is known.
        full_answer: Of the unpruned model.
        full_right: Whether that is right; None where it is not known.
        answers: One for every row shown.
    """

    picture: str
    sha256: str
    question: str
    answer: str | None
    full_answer: str
    full_right: bool | None
    answers: tuple[GalleryAnswer, ...]


@dataclass(frozen=True)
class SweepRecord:
    """Everything a sweep measured.

    Attributes:
        model: Alias, hub id or directory name.
        fingerprint: Hash of the checkpoint (see `Checkpoint.fingerprint`).
        family: Name under `ep_export.families`.
        layers: L.
        dims: The decoder's dimensions.
        tools: Package name -> version.
        date: ISO date.
        machine: Processor and threads the times were measured on.
        seed: Of every random choice.
        dataset: What was asked.
        keeps: Averages that were compared, descending.
        swept_layers: Layers that were compared, ascending; 0 where a method prunes before the decoder.
        methods: In the order of the tables.
        unpruned: The model as it is.
        entropies: By layer.
        recommended: One for every keep; empty when no recommendation was compared.
        rows: Every combination that is possible.
        questions: In the order of `Row.right`.
        gallery: Pictures.
        seconds: How long the run took that wrote this; an interrupted one before it is not counted.
        notes: What a reader should know, e.g. combinations that are impossible.
        scarce: Whether there are so few pictures that most differences are chance; the first note then says
            how few.
        rounded: Rounded weights that every row was measured on as well.
        format: Version of this structure.
    """

    model: str
    fingerprint: str
    family: str
    layers: int
    dims: DecoderDims
    tools: Mapping[str, str]
    date: str
    machine: str
    seed: int
    dataset: Dataset
    keeps: tuple[float, ...]
    swept_layers: tuple[int, ...]
    methods: tuple[MethodInfo, ...]
    unpruned: Unpruned
    entropies: Entropies
    recommended: tuple[Recommended, ...]
    rows: tuple[Row, ...]
    questions: tuple[AnsweredQuestion, ...]
    gallery: tuple[GalleryEntry, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    scarce: bool = False
    rounded: tuple[RoundedUnpruned, ...] = ()
    format: int = SWEEP_FORMAT

    def method(self, key: str) -> MethodInfo:
        """The method of that key.

        Raises:
            KeyError: The sweep has none.
        """
        for method in self.methods:
            if method.key == key:
                return method
        raise KeyError(key)

    def row(self, method: str, layer: int, keep: float) -> Row | None:
        """The row of that combination, if it was measured."""
        wanted = (method, layer, keep)
        return next((row for row in self.rows if (row.method, row.layer, row.keep) == wanted), None)


def read_sweep(path: Path) -> SweepRecord:
    """Read a record from its file or from the directory it lies in.

    Raises:
        UserError: Missing, not JSON, another structure or format, or values that contradict each other.
    """
    return read_document(
        path / SWEEP_FILE if path.is_dir() else path,
        SweepRecord,
        what="sweep record",
        newest=SWEEP_FORMAT,
        oldest=SWEEP_FORMAT,
        hint="sweep again with `ep-export sweep`",
        check=_check,
    )


def write_sweep(path: Path, record: SweepRecord) -> None:
    """Write `sweep.json` into a directory, aside first and then renamed."""
    write_document(path / SWEEP_FILE, record, indent=1)


def _check(record: SweepRecord) -> None:
    """What the types alone do not say.

    Raises:
        ValueError: A count, layer, curve, method or path that does not fit.
    """
    known = {method.key for method in record.methods}
    rounded = {None, *(one.name for one in record.rounded)}
    if len(record.questions) != record.dataset.questions:
        raise ValueError(f"{len(record.questions)} questions, the data set says {record.dataset.questions}")
    for name in ("query", "key", "query_spread", "key_spread"):
        if len(getattr(record.entropies, name)) != record.layers:
            raise ValueError(f"entropies.{name} has not one value a layer")
    for row in record.rows:
        if row.method not in known:
            raise ValueError(f"method {row.method!r} is not described")
        if row.weights not in rounded:
            raise ValueError(f"weights {row.weights!r} are not described")
        if not 0 <= row.layer < record.layers:
            raise ValueError(f"layer {row.layer} is outside 0 to {record.layers - 1}")
        if any(len(draw) != record.dataset.questions or set(draw) - {"0", "1"} for draw in row.right):
            raise ValueError(f"outcomes of {row.method} at layer {row.layer} do not fit the questions")
    for entry in record.gallery:
        if Path(entry.picture).is_absolute() or ".." in Path(entry.picture).parts:
            raise ValueError(f"picture {entry.picture!r} lies outside the record's directory")
        for answer in entry.answers:
            if any(not _in_grid(part) for part in answer.kept):
                raise ValueError(f"kept cells of {entry.picture} do not fit its grids")


def _in_grid(part: KeptPicture) -> bool:
    height, width = part.token_grid
    return all(0 <= cell < height * width for cell in part.kept_tokens)

"""Which combinations of method, layer and keep are compared.

The budget means the same for all: `keep` is the average over all layers, layers before a cut counted in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ep_export.calibrate.candidates import candidate_layers
from ep_export.errors import UsageError, UserError
from ep_export.measure.ways import Scaling, Way, WayCut, on_weights, one_cut, scheduled_way
from ep_export.methods import METHODS, SCALED, SCALED_FLOPS, Method, Place
from ep_export.planning import check_schedule
from ep_export.policy import ADAPTIVE, Cut, Keep, Random, Schedule
from ep_export.sweep.record import RECOMMENDED, SCHEDULE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ep_export.families.base import Family

__all__ = ["Compared", "able_methods", "auto_layers", "compared_ways"]

_SCALED = {SCALED.key: Scaling.TOKENS, SCALED_FLOPS.key: Scaling.FLOPS}

_UNPLACED = frozenset(method.key for method in METHODS if method.place in {Place.STAGES, Place.PICTURE})
"""Methods at whose first layer nothing else needs to be compared."""

_MOST_LAYERS = 3
"""Layers a keep is tried at by default: enough to see a trend, few enough to wait for."""

_LEAST_LEFT = Fraction(1, 3)
"""By default only layers are tried that leave a third of that share or more to the layers after them: a
deeper cut leaves a handful of tokens, whatever chooses them."""


@dataclass(frozen=True)
class Compared:
    """One row to be.

    Attributes:
        method: Key of the row's method: that of its cut, or `RECOMMENDED` or `SCHEDULE`.
        way: What is measured.
        keep: Average share over all layers.
        weights: Name of the rounded weights it is measured on; None is the full ones.
    """

    method: str
    way: Way
    keep: float
    weights: str | None = None

    @property
    def key(self) -> str:
        """Its name in `QuestionResult.ways`."""
        return on_weights(self.way.key, self.weights)

    @property
    def layer(self) -> int:
        """K of the first cut; 0 where the picture is scaled down before the model sees it."""
        return self.way.cuts[0].layer if self.way.cuts else 0


def auto_layers(keep: float, layers: int) -> tuple[int, ...]:
    """Layers inside the decoder that a keep is compared at when none are asked for: at most 3, spread evenly.

    Args:
        keep: Average share over all layers.
        layers: L.

    Raises:
        UsageError: No layer can meet the keep.
    """
    share = Fraction(repr(keep))
    able = candidate_layers(Keep(ratio=keep), layers, range(1, layers))
    left = {layer: (layers * share - layer) / (layers - layer) for layer in able}
    possible = [layer for layer in able if left[layer] >= share * _LEAST_LEFT] or [able[0]]
    if len(possible) <= _MOST_LAYERS:
        return tuple(possible)
    picks = (round(i * (len(possible) - 1) / (_MOST_LAYERS - 1)) for i in range(_MOST_LAYERS))
    return tuple(possible[i] for i in picks)


def able_methods(
    family: Family, config: PreTrainedConfig, methods: Sequence[Method]
) -> tuple[tuple[Method, ...], tuple[str, ...]]:
    """The methods whose needs a model's vision tower can meet, and a note for every other.

    Raises:
        UsageError: None is left.
    """
    if family.patches_per_token(config) is not None:
        return tuple(methods), ()
    able = tuple(method for method in methods if not method.reads_tower)
    notes = tuple(
        f"{method.key} is left out: visual tokens of {family.name} are no runs of patches, so that none has "
        "attention of its own in the vision tower"
        for method in methods
        if method.reads_tower
    )
    if notes and not able:
        raise UsageError(notes[0], hint="name another method as well")
    return able, notes


def compared_ways(
    keeps: Sequence[float],
    layers: int,
    wanted: Sequence[int] | None,
    methods: Sequence[Method],
    *,
    recommended: Mapping[float, Schedule] | None = None,
    adaptive: Mapping[float, tuple[Schedule, Keep]] | None = None,
    schedule: Schedule | None = None,
) -> tuple[tuple[Compared, ...], tuple[str, ...]]:
    """Everything that is compared, keep by keep and layer by layer; and a note for what is impossible.

    Args:
        keeps: Averages.
        layers: L.
        wanted: Layers; `auto_layers` when None.
        methods: K = 0 is added for those that can prune there.
        recommended: Keep -> what a calibration recommends; its first layer is compared too.
        adaptive: Keep -> a schedule, and the keep of that average by which every prompt has its own.
        schedule: Compared besides, its shares scaled to every keep; so is its first layer.

    Raises:
        UsageError: A layer out of range, or a keep that is impossible at every layer.
    """
    rows: list[Compared] = []
    notes: list[str] = []
    for layer in wanted or ():
        check_schedule(Schedule((Cut(layer, Random()),)), layers)
    for keep in keeps:
        budget = Keep(ratio=keep)
        more = {RECOMMENDED: (recommended or {}).get(keep), SCHEDULE: schedule}
        extra = [Compared(k, scheduled_way(s, budget, layers=layers), keep) for k, s in more.items() if s]
        if adaptive and keep in adaptive:
            one_cut_schedule, own = adaptive[keep]
            extra.append(Compared(ADAPTIVE, scheduled_way(one_cut_schedule, own, layers=layers), keep))
        extra += _elsewhere(methods, budget, keep, layers)
        tried = set(auto_layers(keep, layers) if wanted is None else wanted)
        here = tried | {row.layer for row in extra if row.method not in _UNPLACED}
        if any(method.place is Place.ANYWHERE and not method.chance for method in methods):
            here.add(0)
        at_keep: list[Compared] = []
        for layer in sorted(here | {row.layer for row in extra}):
            possible = [
                Compared(method.key, one_cut(layer, method.key, budget), keep)
                for method in methods
                if layer in here
                and (method.place is Place.ANYWHERE or (layer > 0 and method.place is Place.INSIDE))
            ]
            possible += [row for row in extra if row.layer == layer]
            refused = _refusals(possible, layers)
            notes += [f"keep {keep:g} at layer {layer} is left out: {reason}" for reason in refused.values()]
            at_keep += [row for row in possible if row.way not in refused]
        if tried.isdisjoint(row.layer for row in at_keep):
            raise UsageError(
                f"keep {keep:g} is impossible at every layer asked for",
                hint="give an earlier --layer, or a larger --keep",
            )
        rows += at_keep
    return tuple(rows), tuple(dict.fromkeys(notes))


def _elsewhere(methods: Sequence[Method], budget: Keep, keep: float, layers: int) -> list[Compared]:
    """Methods that have layers of their own, or none."""
    rows = []
    for method in methods:
        if method.stages is not None:
            cuts = tuple(WayCut(one.layer, one.method, one.share) for one in method.stages(layers, keep))
            rows.append(Compared(method.key, Way(cuts, budget), keep))
        elif method.key in _SCALED:
            rows.append(Compared(method.key, Way((), budget, _SCALED[method.key]), keep))
    return rows


def _refusals(rows: Sequence[Compared], layers: int) -> dict[Way, str]:
    """Ways whose keep is impossible, and why."""
    refused = {}
    for row in rows:
        if row.way.scaling is not None:
            continue  # only a picture's size can tell
        try:
            row.way.kept(layers=layers, visual_tokens=layers)
        except UserError as error:
            refused[row.way] = str(error)
    return refused

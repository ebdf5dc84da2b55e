"""Ways of pruning that are compared: cuts, what chooses at each, and how much is kept. Data, no torch.

The keep means the same for all: the average share over all layers, layers before a cut counted in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ep_export.errors import UsageError, UserError
from ep_export.planning import check_schedule, kept_tokens
from ep_export.policy import Chooser, Cut, Keep, MaxMin, Schedule, chooser_named

__all__ = ["UNPRUNED", "Scaling", "Way", "WayCut", "on_weights", "one_cut", "scheduled_way"]

UNPRUNED = "unpruned"
"""Key of the unpruned model with rounded weights; with full ones it is what all is compared with."""


class Scaling(str, Enum):
    """What a picture that is scaled down, and not pruned, has in common with a pruned one."""

    TOKENS = "tokens"  # the average number of visual tokens
    FLOPS = "flops"  # FLOPs up to the first token, vision encoder included


@dataclass(frozen=True)
class WayCut:
    """Where visual tokens are dropped, and what chooses.

    Attributes:
        layer: K.
        method: Key of a method: a policy's name, or a rival's (see `ep_export.methods.method_named`).
        share: See `ep_export.policy.Cut`.
    """

    layer: int
    method: str
    share: float | None = None


@dataclass(frozen=True)
class Way:
    """One way of pruning.

    Attributes:
        cuts: In the order of their layers; none where the picture is scaled down.
        keep: Average over all layers.
        scaling: How the picture is scaled down instead; None where tokens are pruned.
    """

    cuts: tuple[WayCut, ...]
    keep: Keep
    scaling: Scaling | None = None

    @property
    def key(self) -> str:
        """Its name in journals and tables, e.g. `2:divprune@0.25`, `2:0.5:divprune+8:0.1:random@0.2`."""
        if self.scaling is not None:
            return f"scaled-{self.scaling.value}@{self.keep}"
        cuts = (
            f"{cut.layer}:{cut.method}" if cut.share is None else f"{cut.layer}:{cut.share:g}:{cut.method}"
            for cut in self.cuts
        )
        return f"{'+'.join(cuts)}@{self.keep}"

    @property
    def schedule(self) -> Schedule:
        """The same cuts for the plan, which asks where and how much; a rival's cut has a stand-in chooser."""
        return Schedule(tuple(Cut(cut.layer, _chooser(cut.method), cut.share) for cut in self.cuts))

    def kept(self, *, layers: int, visual_tokens: int) -> tuple[int, ...]:
        """For every cut the visual tokens that go on, at most; see `kept_tokens`.

        Raises:
            UsageError: The keep is impossible.
        """
        return kept_tokens(self.keep.largest, self.schedule, layers=layers, visual_tokens=visual_tokens)

    def fits(self, *, layers: int, visual_tokens: int) -> bool:
        """Whether the keep is possible there; of a picture scaled down only its size can tell."""
        if self.scaling is not None:
            return False
        try:
            self.kept(layers=layers, visual_tokens=visual_tokens)
        except UserError:
            return False
        return True


def one_cut(layer: int, method: str, keep: Keep) -> Way:
    """The way with a single cut."""
    return Way((WayCut(layer, method),), keep)


def scheduled_way(schedule: Schedule, keep: Keep, *, layers: int) -> Way:
    """The way that a schedule is.

    Raises:
        UsageError: No model of so many layers can follow it.
    """
    check_schedule(schedule, layers)
    return Way(tuple(WayCut(cut.layer, cut.chooser.name, cut.share) for cut in schedule.cuts), keep)


def on_weights(key: str, weights: str | None) -> str:
    """The key of a way or method on rounded weights of that name; None is the full ones."""
    return key if weights is None else f"{key}@{weights}"


def _chooser(method: str) -> Chooser:
    try:
        return chooser_named(method)
    except UsageError:
        return MaxMin()  # like a rival it may stand at any layer and keeps what it is told to

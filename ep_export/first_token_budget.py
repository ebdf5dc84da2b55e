"""Which picture sizes and keeps meet a budget up to the first token: scaling down and pruning, traded.

A model, a picture, a schedule and a budget enter; for every picture size the largest keep that meets it
leaves. Both save decoder work; a smaller picture saves the vision encoder too, where resolution is dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ep_export.errors import UsageError
from ep_export.families.picture_sizes import scaled_size
from ep_export.planning import Plan, make_plan
from ep_export.policy import Keep
from ep_export.vision_flops import VisionWork

if TYPE_CHECKING:
    from ep_export.first_token import Sized
    from ep_export.policy import Schedule

__all__ = ["Cost", "Proposal", "propose"]

Cost: TypeAlias = Callable[[Plan], float]
"""What of a plan is bounded: FLOPs, or milliseconds on a device."""

_SIDES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)
"""Of the picture's own sides: steps that a person would try."""


@dataclass(frozen=True)
class Proposal:
    """A picture size and a keep that meet the budget together.

    Attributes:
        max_pixels: For `--max-pixels`: what the picture is scaled down to.
        size: (width, height) in pixels then.
        keep: The largest whole percentage that meets the budget, as an average over layers.
        plan: Its budgets.
        cost: In the budget's unit.
    """

    max_pixels: int
    size: tuple[int, int]
    keep: float
    plan: Plan
    cost: float

    @property
    def seen(self) -> float:
        """Visual tokens that a layer sees, on average: what is left to answer from."""
        return self.plan.average_kept * self.plan.visual_tokens


def propose(
    model: Sized,
    size: tuple[int, int],
    schedule: Schedule,
    *,
    text_tokens: int,
    settings: Mapping[str, Any],
    cost: Cost,
    budget: float,
) -> tuple[Proposal, ...]:
    """Pairs that meet the budget, the largest picture first; none where no pair does.

    Sizes that the family encodes alike count as one. After the first size that needs no pruning smaller ones
    are left out: they only lose.

    Args:
        model: The model's family, config and dimensions.
        size: (width, height) of the picture in pixels.
        schedule: Where tokens are pruned; its shares are scaled.
        text_tokens: Prompt tokens that are not visual.
        settings: Of the image processor; see `Family.picture_call`.
        cost: What is bounded.
        budget: Its largest value.
    """
    proposals: list[Proposal] = []
    for pixels, scaled, work in _pictures(model, size, settings):
        for plan in _plans(model, work, schedule, text_tokens):
            if cost(plan) <= budget:
                proposals.append(Proposal(pixels, scaled, plan.keep.ratio or 1.0, plan, cost(plan)))
                break
        if proposals and proposals[-1].keep == 1:
            break
    return tuple(proposals)


def _pictures(
    model: Sized, size: tuple[int, int], settings: Mapping[str, Any]
) -> Iterator[tuple[int, tuple[int, int], VisionWork]]:
    """Pixels, size and work of the picture in every size that the family tells apart."""
    tower = model.family.vision_tower(model.config)
    known = set()
    for side in _SIDES:
        scaled = scaled_size(size, max(1, int(math.prod(size) * side**2)))
        call = model.family.picture_call(scaled, model.config, settings)
        if call not in known:
            known.add(call)
            yield math.prod(scaled), scaled, VisionWork(tower, (call,))


def _plans(model: Sized, work: VisionWork, schedule: Schedule, text_tokens: int) -> Iterator[Plan]:
    """A plan for every whole percentage that the schedule can reach, the largest first."""
    for percent in range(100, 0, -1):
        try:
            yield make_plan(
                model.dims,
                schedule,
                Keep(ratio=percent / 100),
                visual_tokens=work.visual_tokens,
                text_tokens=text_tokens,
                vision=work,
            )
        except UsageError:  # beyond what the cuts reach, at either end
            continue

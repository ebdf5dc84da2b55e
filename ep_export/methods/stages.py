"""Ways that drop tokens at several layers: where, and by which method each time.

Published layers are fractions of the model's depth and published numbers are shares; `keep` scales all shares
by one factor. PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247) drops half of what is left at a quarter,
a half and three quarters of the depth, by what the prompt's last token attends to. The Information Horizon's
system (Wang et al., CVPR 2026, arXiv 2512.07580) is DivPrune before the decoder and random tokens deep in it:
284 and 38 of 576 tokens at layers 0 and 20 of 32, on average 192.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep_export.methods.contract import Method, Place, StageCut, Stages
from ep_export.methods.ours import FASTV
from ep_export.policy import MaxMin, Random

__all__ = ["HORIZON", "PYRAMID_DROP", "Stage", "staged"]

_HORIZON = (284 / 576, 38 / 576)


@dataclass(frozen=True)
class Stage:
    """Where tokens are dropped.

    Attributes:
        depth: Of the model, 0 to 1.
        share: Of the prompt's visual tokens.
        method: Key of what chooses.
    """

    depth: float
    share: float
    method: str


def staged(stages: Sequence[Stage]) -> Stages:
    """The stages for a model of so many layers.

    A keep that leaves nothing after the layers before the first stage moves that one forward, to where half
    of the keep is left, and the others evenly behind it.
    """

    def cuts(layers: int, keep: float) -> tuple[StageCut, ...]:
        places = [round(stage.depth * layers) for stage in stages]
        if places[0] >= keep * layers / 2 and stages[0].depth > 0:
            first = max(1, int(keep * layers / 2))
            step = (layers - first) / len(stages)
            places = [first + round(number * step) for number in range(len(stages))]
        # of two at one layer of a small model the later, which drops more
        later = dict(zip(places, stages, strict=True))
        return tuple(
            StageCut(place, stage.method, stage.share)
            for place, stage in sorted(later.items())
            if (place > 0 or stage.depth == 0) and place < layers
        )

    return cuts


PYRAMID_DROP = Method(
    key="pyramiddrop",
    title="PyramidDrop",
    source="arXiv 2410.17247",
    idea="drops in three stages half of what is left: what the prompt's last token attends to least",
    place=Place.STAGES,
    stages=staged(
        (Stage(1 / 4, 1 / 2, FASTV.key), Stage(1 / 2, 1 / 4, FASTV.key), Stage(3 / 4, 1 / 8, FASTV.key))
    ),
    chooser_stages=True,
)

HORIZON = Method(
    key="horizon",
    title="Information Horizon: DivPrune, then random",
    source="arXiv 2512.07580",
    idea="keeps embeddings far from each other before the decoder, and random ones of them deep in it",
    place=Place.STAGES,
    stages=staged(
        (
            Stage(0.0, _HORIZON[0], MaxMin().name),
            Stage(20 / 32, _HORIZON[1], Random().name),
        )
    ),
    chooser_stages=True,
)

"""DART (Wen et al., EMNLP 2025, arXiv 2502.11494): drop what duplicates a few pivots.

At layer K, pivots are the 4 visual tokens and the 4 text tokens after the picture whose keys of layer K-1
(after rotary embedding) have the largest L1 norm. For every pivot in turn, the visual tokens least similar to
it are kept: cosine of the hidden states that enter layer K, after the decoder's last norm, as in the authors'
code. Visual pivots are kept too. Their default is K = 2.

Two things differ from their code, for equal budgets and repeatable runs: exactly k tokens are kept (theirs
keeps 4 + 8 floor(k / 8)), the rest of the division going to the first pivots; and pivots take turns by
strength, visual ones first (theirs walks a Python set).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ep_export.methods.contract import Method, TokenView

__all__ = ["DART", "least_duplicated"]

VISUAL_PIVOTS = 4
TEXT_PIVOTS = 4


def least_duplicated(
    states: torch.Tensor, pivots: Sequence[int], candidates: Sequence[int], k: int
) -> list[int]:
    """Share k places among pivots; each takes the candidates least similar to it.

    Args:
        states: [n, d].
        pivots: Rows that are compared with, in order; at least one.
        candidates: Rows that may be kept.
        k: How many, at most all candidates.

    Returns:
        Kept rows in the order they are taken; ties to the candidate named first.
    """
    left = list(candidates)
    kept: list[int] = []
    for turn, pivot in enumerate(pivots):
        share = k // len(pivots) + (turn < k % len(pivots))
        if share == 0:
            break
        similar = torch.nn.functional.cosine_similarity(states[pivot][None], states[left], dim=-1)
        order = similar.argsort(stable=True)[:share].tolist()
        kept += [left[i] for i in order]
        taken = set(order)
        left = [row for i, row in enumerate(left) if i not in taken]
    return kept


def _pivots(view: TokenView) -> tuple[list[int], list[int]]:
    """Positions of the visual and of the text pivots, strongest first."""
    _, keys = view.inside.rotate(view.inside.queries, view.inside.keys)
    strength = keys.flatten(1).float().abs().sum(dim=1)
    visual = view.visual_index
    text = torch.arange(int(visual[-1]) + 1, len(strength), device=visual.device)
    best = (
        positions[strength[positions].argsort(descending=True, stable=True)[:most]].tolist()
        for positions, most in ((visual, VISUAL_PIVOTS), (text, TEXT_PIVOTS))
    )
    return next(best), next(best)


def _choose(view: TokenView, k: int) -> torch.Tensor:
    visual_pivots, text_pivots = view.once("dart", lambda: _pivots(view))
    visual_pivots = visual_pivots[:k]
    pivots = set(visual_pivots)
    candidates = [position for position in view.visual_index.tolist() if position not in pivots]
    states = view.once("dart states", lambda: view.final_norm(view.hidden).float())
    rest = least_duplicated(states, [*visual_pivots, *text_pivots], candidates, k - len(visual_pivots))
    return torch.tensor(sorted([*visual_pivots, *rest]), dtype=torch.int64, device=view.visual_index.device)


DART = Method(
    key="dart",
    title="DART",
    source="arXiv 2502.11494",
    idea="keeps what is least similar to a few pivot tokens",
    choose=_choose,
    published_layer=2,
)

"""Token views made by hand: no model, a few tokens, numbers one can follow."""

from __future__ import annotations

import torch

from ep_export.methods import LayerStates, TokenView

__all__ = ["make_view", "unturned"]


def unturned(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotary embedding that turns nothing."""
    return queries, keys


def make_view(
    *,
    visual: list[int],
    embeds: torch.Tensor,
    hidden: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    instruction: list[int] | None = None,
    received: list[float] | None = None,
) -> TokenView:
    """A view of `len(embeds)` positions; without keys there is no layer before (K = 0).

    Visual tokens received equal attention in the vision tower unless `received` says how much.
    """
    states = None
    if keys is not None:
        states = LayerStates(
            queries=torch.zeros_like(keys) if queries is None else queries,
            keys=keys,
            rotate=unturned,
            scale=1.0,
        )
    return TokenView(
        visual_index=torch.tensor(visual),
        instruction=torch.tensor(instruction or [], dtype=torch.int64),
        embeds=embeds,
        hidden=embeds if hidden is None else hidden,
        final_norm=lambda states: states,
        states=states,
        tower_attention=lambda: torch.tensor(received or [1.0] * len(visual)),
    )

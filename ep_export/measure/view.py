"""From what arrives at a cut to what a rival method may look at."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ep_export.errors import UserError
from ep_export.methods import LayerStates, TokenView
from ep_export.policy import Source

if TYPE_CHECKING:
    from ep_export.dims import DecoderDims
    from ep_export.families.base import DecoderModules, PromptInputs
    from ep_export.measure.full_pass import FullPass
    from ep_export.measure.pruned import Arrival

__all__ = ["instruction_positions", "token_view"]


def token_view(
    decoder: DecoderModules,
    dims: DecoderDims,
    full: FullPass,
    arrival: Arrival,
    *,
    instruction: torch.Tensor,
) -> TokenView:
    """The prompt as a method sees it.

    Args:
        decoder: The model's decoder.
        dims: Its dimensions.
        full: The pass that `arrival` comes from.
        arrival: What arrives.
        instruction: [T] prompt positions, see `instruction_positions`.
    """
    positions = arrival.positions
    return TokenView(
        visual_index=arrival.visual_index,
        instruction=torch.searchsorted(positions, instruction.to(positions.device)),
        embeds=full.hidden[0][0].index_select(0, positions),
        hidden=arrival.hidden,
        final_norm=decoder.norm,
        states=_states(decoder, dims, full, arrival) if arrival.layer > 0 else None,
    )


def instruction_positions(prompt: PromptInputs, question: Sequence[int]) -> torch.Tensor:
    """Where the question's own words stand in the prompt.

    Args:
        prompt: With at least one visual token.
        question: The question's token ids, tokenized alone. The first may come out otherwise behind the
            template's words, so it may be missing.

    Returns:
        [T] int64; all text after the picture where the question is not found.
    """
    ids = prompt.input_ids[0].tolist()
    for words in (list(question), list(question)[1:]):
        for start in range(len(ids) - len(words), -1, -1):  # the question is the last thing of the template
            if words and ids[start : start + len(words)] == words:
                return torch.arange(start, start + len(words))
    return torch.arange(int(prompt.visual_index[-1]) + 1, len(ids))


def _states(decoder: DecoderModules, dims: DecoderDims, full: FullPass, arrival: Arrival) -> LayerStates:
    attention: Any = decoder.layers[arrival.layer - 1].self_attn
    tables = full.arguments[arrival.layer - 1]["position_embeddings"]
    cos, sin = (table.index_select(-2, arrival.positions) for table in tables)
    queries, keys = arrival.projections[Source.QUERY], arrival.projections[Source.KEY]
    return LayerStates(
        queries=queries.reshape(len(queries), dims.heads, -1),
        keys=keys.reshape(len(keys), dims.kv_heads, -1),
        rotate=_rotation(attention, cos, sin),
        scale=float(attention.scaling),
    )


def _rotation(
    attention: Any, cos: torch.Tensor, sin: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The rotary embedding that the attention itself applies: the function of its modelling file."""
    file = type(attention).__module__
    apply = getattr(sys.modules[file], "apply_rotary_pos_emb", None)

    def rotate(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if apply is None:
            raise UserError(
                f"{file} has no rotary embedding that is known here, so attention cannot be computed",
                hint="leave fastv and dart out of --methods",
            )
        turned = apply(queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], cos, sin)
        return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)

    return rotate

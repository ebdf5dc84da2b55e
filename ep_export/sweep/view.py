"""From a full pass to what a method may look at."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ep_export.errors import UserError
from ep_export.methods import LayerStates, TokenView

if TYPE_CHECKING:
    from ep_export.calibrate.fidelity import FullPass, Projected
    from ep_export.dims import DecoderDims
    from ep_export.families.base import DecoderModules, PromptInputs

__all__ = ["instruction_positions", "token_view"]


def token_view(
    decoder: DecoderModules,
    dims: DecoderDims,
    full: FullPass,
    layer: int,
    *,
    prompt: PromptInputs,
    instruction: torch.Tensor,
    rng: np.random.Generator,
    projected: Projected | None = None,
) -> TokenView:
    """The prompt at the door of layer K; what was fed after the prompt is left out.

    Args:
        decoder: The model's decoder.
        dims: Its dimensions.
        full: A pass with layers 0 and K among its doors.
        layer: K.
        prompt: What was asked.
        instruction: See `instruction_positions`.
        rng: For methods that draw.
        projected: Projections of layer K-1; those of the pass when None.
    """
    length = prompt.input_ids.shape[1]
    states = None
    if layer > 0:
        states = _states(decoder, dims, full, layer, length, projected or full.projected[layer])
    return TokenView(
        visual_index=full.visual_index,
        instruction=instruction.to(full.visual_index.device),
        embeds=full.hidden[0][0, :length],
        hidden=full.hidden[layer][0, :length],
        final_norm=decoder.norm,
        states=states,
        rng=rng,
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


def _states(
    decoder: DecoderModules, dims: DecoderDims, full: FullPass, layer: int, length: int, projected: Projected
) -> LayerStates:
    attention: Any = decoder.layers[layer - 1].self_attn
    tables = full.arguments[layer - 1]["position_embeddings"]
    cos, sin = (table[..., :length, :] for table in tables)
    return LayerStates(
        queries=projected.query[:length].view(length, dims.heads, -1),
        keys=projected.key[:length].view(length, dims.kv_heads, -1),
        values=projected.value[:length].view(length, dims.kv_heads, -1),
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

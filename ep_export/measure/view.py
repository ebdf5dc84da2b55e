"""From what arrives at a cut to what a rival method may look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ep_export.families.attention import PORTABLE_VISION, use_vision_forms
from ep_export.methods import LayerStates, TokenView
from ep_export.reference.spans import layer_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ep_export.dims import DecoderDims
    from ep_export.families.base import DecoderModules, Family, Picture, PromptInputs
    from ep_export.measure.full_pass import FullPass
    from ep_export.measure.pruned import Arrival

__all__ = ["arrived_states", "instruction_positions", "token_view", "tower_attention"]


def token_view(
    decoder: DecoderModules,
    dims: DecoderDims,
    full: FullPass,
    arrival: Arrival,
    *,
    instruction: torch.Tensor,
    tower: Callable[[], torch.Tensor],
) -> TokenView:
    """The prompt as a method sees it.

    Args:
        decoder: The model's decoder.
        dims: Its dimensions.
        full: The pass that `arrival` comes from.
        arrival: What arrives.
        instruction: [T] prompt positions, see `instruction_positions`.
        tower: Gives `tower_attention` of the prompt.
    """
    positions = arrival.positions
    arrived = torch.isin(full.visual_index, positions)
    return TokenView(
        visual_index=arrival.visual_index,
        instruction=torch.searchsorted(positions, instruction.to(positions.device)),
        embeds=full.hidden[0][0].index_select(0, positions),
        hidden=arrival.hidden,
        final_norm=decoder.norm,
        states=arrived_states(decoder, dims, full, arrival) if arrival.layer > 0 else None,
        tower_attention=lambda: tower()[arrived],
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


def arrived_states(
    decoder: DecoderModules, dims: DecoderDims, full: FullPass, arrival: Arrival
) -> LayerStates:
    """States of the layer before a cut, K at least 1, for what arrives; see `token_view`."""
    attention: Any = decoder.layers[arrival.layer - 1].self_attn
    tables = full.arguments[arrival.layer - 1]["position_embeddings"]
    here = tuple(table.index_select(-2, arrival.positions) for table in tables)
    return layer_states(attention, dims, arrival.projections, here)


def tower_attention(family: Family, model: PreTrainedModel, prompt: PromptInputs) -> torch.Tensor:
    """How much attention every visual token received in the vision tower.

    In the last block that leads to the features and attends beyond windows: from the class token where there
    is one, else from all patches; mean over heads, over those patches, and over the patches of a token.

    Args:
        family: With `Family.patches_per_token`.
        model: Of this family.
        prompt: With pictures, no videos.

    Returns:
        [N] float32, on the model's device.

    Raises:
        ValueError: The family's visual tokens have no patches of their own.
    """
    patches = family.patches_per_token(model.config)
    if patches is None:
        raise ValueError(f"visual tokens of {family.name} are no runs of patches")
    received = [_received(family, model, picture) for picture in prompt.pictures]
    return torch.cat([one.reshape(-1, patches).mean(dim=1) for one in received])


def _received(family: Family, model: PreTrainedModel, picture: Picture) -> torch.Tensor:
    """[P] what the patches of a picture received: the encoder's own blocks, run by themselves."""
    trace = family.vision(model)
    last = max(number for number, kind in enumerate(trace.kinds) if kind == "full")
    seen: list[torch.Tensor] = []

    def attend(query: Any, key: Any, value: Any, mask: Any, scale: float, *, heads: int) -> torch.Tensor:
        seen[:] = (x[0].unflatten(-1, (heads, -1)).transpose(0, 1).float() for x in (query * scale, key))
        return PORTABLE_VISION.attention(query, key, value, mask, scale, heads=heads)

    feeds = family.vision_feeds(picture, model.config).values()
    with use_vision_forms(replace(PORTABLE_VISION, attention=attend)), torch.inference_mode():
        hidden = trace.stem(*(torch.from_numpy(feed).to(model.device) for feed in feeds))
        hidden, *carry = hidden if isinstance(hidden, tuple) else (hidden,)
        for block in trace.blocks[: last + 1]:
            hidden = block(hidden, *carry)
    queries, keys = seen  # [heads, class tokens and patches, D]
    first = family.vision_tower(model.config).class_tokens
    looking = slice(0, first or None)
    # a head at a time: all scores of a large picture are a gigabyte
    pairs = zip(queries[:, looking], keys, strict=True)
    heads = [(query @ key.T).softmax(dim=-1).mean(dim=0) for query, key in pairs]
    return torch.stack(heads).mean(dim=0)[first:]

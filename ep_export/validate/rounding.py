"""What rounding the weights costs, apart from what the arithmetic of a bundle does.

The unquantised, unpruned model answers; its own answer is then fed to the quantised model, to the pruned one,
and to the one that is both: how far their predictions lie from its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.measure.full_pass import before_placeholder
from ep_export.measure.pruned import gap
from ep_export.numerics import RoundingCost
from ep_export.reference import PruneSpec, greedy, prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import PromptInputs

__all__ = ["rounding_costs"]


def rounding_costs(
    plain: PreTrainedModel,
    quantised: PreTrainedModel,
    checkpoint: Checkpoint,
    prompts: Sequence[PromptInputs],
    spec: PruneSpec,
    max_new_tokens: int,
) -> tuple[RoundingCost, ...]:
    """Measure quantisation, pruning, and both.

    Args:
        plain: The checkpoint's own weights.
        quantised: The same with the dequantised weights of a bundle.
        checkpoint: Both come from it.
        prompts: Those without pictures are left out.
        spec: How the pruned variants are pruned.
        max_new_tokens: Longest answer.
    """
    variants = {
        "quantised": (quantised, False),
        "pruned": (plain, True),
        "quantised and pruned": (quantised, True),
    }
    gaps = dict.fromkeys(variants, (0.0, 0))
    positions = 0
    for prompt in prompts:
        if not len(prompt.visual_index):
            continue
        answer = greedy(plain, checkpoint.family, checkpoint.config, prompt, max_new_tokens)
        answer = before_placeholder(answer, checkpoint.config)
        reference = _predictions(plain, checkpoint, prompt, answer, None)
        positions += len(answer)
        for name, (model, pruned) in variants.items():
            found = gap(reference, _predictions(model, checkpoint, prompt, answer, spec if pruned else None))
            kl, agreements = gaps[name]
            gaps[name] = (kl + found.kl, agreements + found.agreements)
    if not positions:
        return ()
    return tuple(
        RoundingCost(name, kl / positions, agreements / positions, positions)
        for name, (kl, agreements) in gaps.items()
    )


def _predictions(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    prompt: PromptInputs,
    answer: Sequence[int],
    spec: PruneSpec | None,
) -> torch.Tensor:
    """[answer, vocab] log-probabilities at the positions that predict an answer."""
    ids = np.concatenate([prompt.input_ids, np.asarray([answer[:-1]], dtype=np.int64)], axis=1)
    inputs = checkpoint.family.reference_inputs(replace(prompt, input_ids=ids), checkpoint.config)
    with prune(model, spec) if spec else nullcontext(), torch.inference_mode():
        logits = model(**inputs, use_cache=False).logits
    predictions: torch.Tensor = logits[0, -len(answer) :].float().log_softmax(dim=-1)
    return predictions
